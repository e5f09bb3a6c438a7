"One untrained captioner, one running page on it, shared by all tests of the demo"
import pytest
import torch


@pytest.fixture(scope='session')
def tool():
    "A captioner that never learned anything: what is tested is the page, not the captions"
    from vl_tutor.models.captioner import SIZES, Captioner
    from vl_tutor.recipes.captioner import CaptionTool
    from vl_tutor.world.language import world_tokenizer
    torch.manual_seed(0)
    model = Captioner(SIZES['tiny']).eval()
    with torch.no_grad():
        for block in model.gated.values(): block.gate_attn.fill_(.5)      # doors open, so that words look somewhere
    return CaptionTool(model, world_tokenizer(), {})


@pytest.fixture(scope='session')
def desk(tool):
    from vl_tutor.demos.captioning import CaptionDesk
    return CaptionDesk(tool)


@pytest.fixture(scope='session')
def page(tool):
    "A running demo, on a copy of the captioner: the page has it to itself, and tests may use theirs meanwhile"
    from copy import deepcopy
    from vl_tutor.demos.captioning import launch_demo
    demo = launch_demo(deepcopy(tool), wait=False)
    yield demo
    demo.close()


@pytest.fixture(scope='session')
def scene(tmp_path_factory, desk):
    "A scene on disk, and the truth about it"
    path = tmp_path_factory.mktemp('pictures')/'scene.png'
    image, truth, _ = desk.roll('shapes', 'pair', 3)
    image.resize((240, 240), 0).save(path)
    return path, truth
