"""The scripts in examples/applications and examples/experiments on the bundled model, in a few
steps: what they promise to write is there, and what can be checked of it holds."""

import csv
import importlib
import json
import subprocess
import sys
from pathlib import Path

import common
import evaluate
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import textinv
from models.checkpoint import BUNDLED
from models.images import prepare_images
from models.layers import attention

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "examples").rglob("*.py"))
FEW = ["--quick", "--training-steps", "2", "--steps", "2", "-n", "2"]


def run(name: str, out: Path, *arguments: object) -> None:
    importlib.import_module(name).main([*FEW, "--out", str(out), *map(str, arguments)])


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """One folder for all: words that one script learns are there for the next."""
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize(
    "name",
    "words gallery style composition bias editing curation bipartite weights baselines".split(),
)
def test_the_script_draws_its_picture(name, out):
    extra = {"baselines": ["--word-steps", "2"]}.get(name, [])
    run(name, out, *extra)
    picture = Image.open(out / f"{name}.png").convert("RGB")
    assert picture.width > 200 and np.asarray(picture).std() > 20


HELP = """
import runpy, sys
import torch  # once for all, to save time

started, folder, *scripts = [set(sys.modules), *sys.argv[1:]]
path = sys.path[1:]
for script in scripts:
    sys.path[:] = [script.rpartition("/")[0], *path]
    sys.argv = [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as done:
        assert not done.code, script
    for name, module in [*sys.modules.items()]:
        if name not in started and str(getattr(module, "__file__", "")).startswith(folder):
            del sys.modules[name]
    print("helped", script)
"""


def test_every_script_starts_by_itself(tmp_path):
    """As a person calls it, from anywhere, without the package being installed or matplotlib."""
    scripts = [path.as_posix() for path in SCRIPTS if "__main__" in path.read_text()]
    (tmp_path / "matplotlib.py").write_text("raise ImportError('No module named matplotlib')")
    options = dict(capture_output=True, text=True, env={"PYTHONPATH": str(tmp_path)})
    command = [sys.executable, "-c", HELP, ROOT.as_posix(), *scripts]
    done = subprocess.run(command, cwd=tmp_path, **options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("helped") == len(scripts) > 25


def test_every_folder_of_scripts_finds_the_repository_in_the_same_way():
    copies = [path.read_text() for path in SCRIPTS if path.name == "repository.py"]
    assert len(copies) == 4 and len(set(copies)) == 1


def test_words_of_files_work_in_galleries(out, tmp_path):
    model = textinv.load_model()
    word = textinv.Concept("<own>", textinv.initial_vectors(model, "cat", 1))
    word.save(tmp_path / "own.safetensors")
    own = str(tmp_path / "own.safetensors")
    given = ["--steps", "2", "-n", "2", "--out", str(tmp_path), "--prompts", "a {}", "--concepts"]
    heights = []
    for files in ([own], [own, own]):  # words of the same name have a row each
        importlib.import_module("gallery").main([*given, *files])
        heights.append(Image.open(tmp_path / "gallery.png").height)
    assert heights[1] > 2 * heights[0] and not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    "script, arguments, said",
    (
        (
            "applications/gallery.py",
            ["--quick", "--concepts", "gone.safetensors"],
            "gallery.py: gone.safetensors: no such file; bundled sets are mushroom",
        ),
        ("bundled/train_emoji.py", ["gone", "work", "export"], "train_emoji.py: gone has no"),
        ("bundled/make_concepts.py", ["gone"], "make_concepts.py: gone has no"),
        ("bundled/check_emoji.py", ["--steps", "0"], "check_emoji.py: steps 0 is out of range"),
        ("chart.py", ["gone.csv", "chart.png"], "chart.py: [Errno 2] No such file"),
    ),
)
def test_a_mistake_is_one_line(tmp_path, script, arguments, said):
    command = [sys.executable, str(ROOT / "examples" / script), *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert said in done.stderr


def test_ctrl_c_ends_a_script_with_one_line(capsys, monkeypatch):
    def stopped():
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["examples/applications/gallery.py"])
    with pytest.raises(SystemExit) as done:
        common.run_script(stopped)
    assert done.value.code == 130 and capsys.readouterr().err == "gallery.py: stopped\n"


def test_inverted_noise_comes_back_better_with_more_steps():
    """Appendix E: eta 0, one prompt, no guidance, there and back."""
    model = textinv.load_model()
    path = ROOT / "examples" / "concepts" / "teddy" / "2.png"
    latents = model.encode_images(prepare_images([path], model.size))
    context, uncond = model.conditioning(["a photo of a bear"], [])
    given = dict(context=context, uncond=uncond, guidance_scale=1)
    predict = lambda x, t: model.guided(x, t, **given)
    errors = []
    for steps in (10, 25, 100):
        *_, x_T = model.schedule.ddim_invert(predict, latents, steps)
        back = [*model.schedule.ddim_sample(predict, x_T, steps)][-1]
        errors.append(((back - latents).square().mean().sqrt() / latents.std()).item())
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.1 < errors[0]


def test_pivotal_tuning_keeps_a_difference_and_exports_a_checkpoint(out, tmp_path):
    """The difference on the base is the tuned model (to bf16's last digit), the exported checkpoint
    loads by itself, and the model on disk is as it was."""
    from difference import add_difference, check_export

    exported = tmp_path / "whole" / "model.safetensors"
    run("pivotal", out, "--tuning-steps", 3, "--export", exported)
    difference = out / "pivotal" / "teddy.safetensors"
    changes = load_file(difference)
    assert all("attn" in key for key in changes) and changes
    assert difference.stat().st_size < exported.stat().st_size / 2
    base, tuned = textinv.load_model(), textinv.load_model(exported.parent)
    added = textinv.load_model()
    add_difference(added, difference)
    tables = [model.unet.state_dict() for model in (base, tuned, added)]
    for key in tables[0]:
        changed = f"model.diffusion_model.{key}" in changes
        assert torch.allclose(tables[1][key], tables[2][key], atol=1e-3), key
        assert torch.equal(tables[0][key], tables[2][key]) != changed or not changed, key
    moved = max(change.float().abs().max() for change in changes.values())
    assert 1e-5 < moved < 1e-2
    with pytest.raises(ValueError, match="model.safetensors exists; choose another name"):
        check_export(None, exported)
    add_difference(added, difference, share=-1)
    assert all(
        torch.allclose(a, b, atol=1e-6) for a, b in zip(tables[0].values(), tables[2].values())
    )


def test_a_difference_of_another_model_is_refused(tmp_path):
    from difference import add_difference
    from safetensors.torch import save_file

    save_file({"model.diffusion_model.nothing": torch.zeros(1)}, tmp_path / "d.safetensors")
    with pytest.raises(ValueError, match="no weight of emoji"):
        add_difference(textinv.load_model(), tmp_path / "d.safetensors")


def test_tuning_lowers_the_loss_and_freezes_the_model_again():
    from pivotal import loss_of
    from tuning import tune

    model = textinv.load_model()
    word = textinv.Concept("<t>", textinv.initial_vectors(model, "toy", 1))
    loss = loss_of(model, ROOT / "examples" / "concepts" / "teddy", word, batch_size=2)
    with torch.no_grad():
        before = np.mean([loss(1000 + i).item() for i in range(8)])
    for _ in tune(model, loss, 15, 3e-4, "attn"):
        pass
    with torch.no_grad():
        after = np.mean([loss(1000 + i).item() for i in range(8)])
    assert after < before
    assert not any(p.requires_grad for p in model.unet.parameters())
    assert not model.unet.gradient_checkpointing


def test_curation_writes_the_pictures_that_clip_ranks_first(out, tmp_path, monkeypatch):
    """Here the order: the K best of each row, best first, each with its seed."""
    import curation

    ranked = []

    def rank(scorer, images, text):
        ranked.append((images, text, evaluate.rank(scorer, images, text)))
        return ranked[-1][2]

    monkeypatch.setattr(curation, "rank", rank)
    prompts = ["--prompts", "a ({}:1.1)", "a sketch of {}"]
    run("curation", out, "-n", 4, "--keep", 2, *prompts)
    assert [text for _, text, _ in ranked] == ["a plant", "a sketch of plant"]
    for number, (images, _, order) in enumerate(ranked):
        assert sorted(order) == [0, 1, 2, 3]
        for place in (0, 1):
            kept = Image.open(out / "curation" / f"{number:02d}-{place + 1}.png")
            assert np.array_equal(np.asarray(kept), np.asarray(images[order[place]]))
            assert json.loads(kept.text["settings"])["seed"] == order[place]
    with pytest.raises(SystemExit):
        run("curation", out, "-n", 4, "--keep", 9)


def test_imagic_begins_with_the_picture_and_ends_with_the_text(out):
    run("imagic", out, "--tuning-steps", 3)
    assert (out / "imagic.png").exists()


def test_clip_guidance_raises_the_cosine_that_it_climbs(out):
    from clip_guided import clip_guided
    from common import Workspace, make_parser

    workspace = Workspace.open(make_parser("test").parse_args(["--out", str(out), *FEW]))
    goal = workspace.scorer.texts(["a photo of a tomato"])
    scores = []
    for scale in (0.0, 200.0):
        drawn = clip_guided(workspace, goal, n=2, steps=10, scale=scale)
        scores.append((workspace.scorer.images(drawn) @ goal.T).mean().item())
    assert scores[1] > scores[0] + 0.05


def test_the_contrastive_word_is_nearer_to_its_pictures_than_other_words(out):
    from baselines import OTHERS, contrastive_word, text_features
    from common import Workspace, concept_folder, make_parser, open_images

    workspace = Workspace.open(make_parser("test").parse_args(["--out", str(out), *FEW]))
    workspace.scorer.clip.requires_grad_(False)
    features = workspace.scorer.images(open_images(concept_folder("mushroom")))
    word = contrastive_word(workspace, features, steps=40)
    texts = text_features(workspace, [f"a photo of a {w}" for w in ("*", *OTHERS)], word)
    assert ((features @ texts.T).argmax(1) == 0).all()
    plain = text_features(workspace, ["a photo of a cat"], word)
    torch.testing.assert_close(plain, workspace.scorer.texts(["a photo of a cat"]))


def test_fig7_measures_setups_and_references_once(out, monkeypatch, capsys):
    import fig7

    monkeypatch.setattr(fig7, "SETUPS", {k: fig7.SETUPS[k] for k in ("ours", "3 vectors")})
    monkeypatch.setattr(fig7, "REFERENCES", ("image only", "short captions"))
    prompts = {"background": ["A photo of {} on the beach"]}
    monkeypatch.setattr(evaluate, "read_prompts", lambda: prompts)
    run("fig7", out)
    table = (out / "fig7.csv").read_text()
    assert len(table.splitlines()) == 1 + 4 * 2 * 2  # setups, sets, prompts
    assert "against ours" in capsys.readouterr().out
    monkeypatch.setattr(common, "evaluate", None)  # all is there: nothing is computed again
    run("fig7", out)
    assert (out / "fig7.csv").read_text() == table
    run("fig7", out, "--setups", "short captions", "--concepts", "mushroom")
    rows = list(csv.DictReader((out / "fig7.csv").read_text().splitlines()))
    assert {row["setup"] for row in rows} == {"ours", "short captions"}
    assert {row["name"] for row in rows} == {"mushroom"}


def test_every_set_has_five_pictures_and_captions_that_the_model_can_read():
    known = set((BUNDLED / "vocab.txt").read_text().split())
    for name in common.CONCEPTS:
        pictures = common.open_images(common.concept_folder(name))
        assert [picture.size for picture in pictures] == [(64, 64)] * 5
        if name not in common.STYLES:
            captions = evaluate.read_captions(common.EXAMPLES / "captions" / f"{name}.txt")
            assert list(captions) == ["short captions", "long captions"]
            assert known.issuperset(" ".join(sum(captions.values(), [])).split())


def test_steps_measures_runs_of_several_lengths(out, monkeypatch, capsys):
    import steps

    monkeypatch.setattr(steps, "SHARES", (2,))
    monkeypatch.setattr(
        evaluate, "read_prompts", lambda: {"background": ["A photo of {} at night"]}
    )
    run("steps", out)
    rows = list(csv.DictReader((out / "steps.csv").read_text().splitlines()))
    assert [*dict.fromkeys(row["setup"] for row in rows)][1:] == ["auto", "ours"]
    assert "against ours" in capsys.readouterr().out


def test_more_steps_of_a_sampler_come_nearer(out):
    run("samplers", out)
    rows = list(csv.DictReader((out / "samplers.csv").read_text().splitlines()))
    mean = {(row["sampler"], int(row["steps"])): float(row["mean"]) for row in rows}
    assert mean["dpm++", 20] < mean["dpm++", 14] < mean["dpm++", 10] < 0.1
    assert mean["ddim", 50] < mean["ddim", 20]


def test_masks_are_white_where_the_thing_is(out, capsys):
    run("masks", out, "--sets", "teddy", "--seeds", "1")
    assert [line[:16] for line in capsys.readouterr().out.splitlines() if "| 0 |" in line] == [
        "| teddy | False ",
        "| teddy | True |",
    ]
    for i in range(5):
        white = np.asarray(Image.open(out / "masks" / "teddy" / f"{i}.mask.png")) > 0
        assert white[40, 32] and not white[[0, -1], [0, -1]].any() and 0.3 < white.mean() < 0.6


def test_training_sets_are_of_the_sizes_that_they_say(out, monkeypatch):
    import training_set

    assert [len(range(*chosen.indices(35))) for chosen in training_set.SETUPS.values()] == [
        *(1, 2, 5, 10, 25),
        *(5, 5, 5),
    ]
    few = {k: training_set.SETUPS[k] for k in ("1 picture", "one pose")}
    monkeypatch.setattr(training_set, "SETUPS", few)
    monkeypatch.setattr(
        evaluate, "read_prompts", lambda: {"background": ["A photo of {} at night"]}
    )
    run("training_set", out)
    rows = list(csv.DictReader((out / "training_set.csv").read_text().splitlines()))
    assert {row["setup"] for row in rows} == set(few)


def test_broad_words_are_measured_at_several_steps_of_one_run(out, monkeypatch):
    import broad

    monkeypatch.setattr(broad, "SETS", {"parrots": broad.SETS["parrots"]})
    runs = []
    train = textinv.train

    def counted(*args, **options):
        runs.append(options)
        return train(*args, **options | dict(batch_size=1))

    monkeypatch.setattr(textinv, "train", counted)
    monkeypatch.setattr(broad, "STEPS", {True: [1, 3]})
    run("broad", out)
    rows = list(csv.DictReader((out / "broad.csv").read_text().splitlines()))
    assert [(row["pictures"], row["steps"]) for row in rows] == [
        *(("1", "1"), ("1", "3")),
        *(("5", "1"), ("5", "3")),
    ]
    assert len(runs) == 2 and all(float(row["frechet"]) > 0 for row in rows)


def test_coverage_tests_every_share(out):
    run("coverage", out, "-n", 9)
    rows = list(csv.DictReader((out / "coverage.csv").read_text().splitlines()))
    assert [row["kind"] for row in rows] == ["object", "style"]
    assert all(0 <= float(row[f"1/{k}"]) <= 1 for row in rows for k in (1, 2, 4, 6, 8))


def test_results_of_quick_runs_lie_apart():
    from common import Workspace, make_parser

    outs = [Workspace.open(make_parser("test").parse_args(a)).out for a in ([], ["--quick"])]
    assert [str(path) for path in outs] == [str(Path("runs/emoji")), str(Path("runs/emoji-quick"))]


def test_sheets_hold_every_picture_at_its_place():
    from common import GAP, LABEL, SIDE, sheet

    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    page = sheet({"one": [red, None], "two": [blue, red]}, ["a long caption that wraps", "b"])
    top = page.height - 2 * SIDE - GAP
    centre = lambda i, j: (LABEL + i * (SIDE + GAP) + SIDE // 2, top + j * (SIDE + GAP) + SIDE // 2)
    colours = [page.getpixel(centre(i, j)) for j in (0, 1) for i in (0, 1)]
    assert colours == [(255, 0, 0), (255, 255, 255), (0, 0, 255), (255, 0, 0)]


def test_attention_on_the_cpu_is_among_the_flops_counted():
    """Of 6 queries, 10 keys, 8 numbers and 3 heads: two products forward, five backward, for
    the scores are computed once more."""
    from benchmark import count_flops

    q = torch.randn(1, 6, 24, requires_grad=True)
    k, v = torch.randn(1, 10, 24), torch.randn(1, 10, 24)
    product = 2 * 3 * 6 * 10 * 8
    assert count_flops(lambda: attention(q, k, v, 3)) == 2 * product
    assert count_flops(lambda: attention(q, k, v, 3).sum().backward()) == 7 * product
