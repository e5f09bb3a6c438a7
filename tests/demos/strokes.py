"A hand that draws on a page's board, and an eye that finds the red"


def draw(tab, board):
    "One wavy line through the middle of the canvas, once it has settled"
    canvas = tab.locator(f'{board} canvas').first
    canvas.wait_for(timeout=60_000)
    tab.wait_for_timeout(1500)
    box = canvas.bounding_box()
    x, y = box['x'] + box['width']/2, box['y'] + box['height']/2
    tab.mouse.move(x - 60, y)
    tab.mouse.down()
    for k in range(-60, 61, 6): tab.mouse.move(x + k, y + (k % 12))
    tab.mouse.up()
    tab.wait_for_timeout(800)


def red(shown):
    "The share of red pixels in `(h w 3)`"
    return ((shown[..., 0] > 150) & (shown[..., 1] < 110) & (shown[..., 2] < 110)).mean()
