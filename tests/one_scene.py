"The picture that tests of explanations ask about: two things, their caption, their boxes"
import torch
from vl_tutor.world.language import captions
from vl_tutor.world.scenes import World

WORLD = World('pair', 'test', skin='mixed', image_size=48)
SCENES = WORLD.scenes(torch.arange(4))
IMAGE, TEXT, BOXES = WORLD.draw(SCENES)[1], captions(SCENES)[1], WORLD.boxes(SCENES)[1]
