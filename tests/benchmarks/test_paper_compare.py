from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
from worlds import Run

import disback_plugin as disback

COMPARE = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "paper" / "compare.py"))
main = COMPARE["main"]


def edm_run(folder, fids, name="metric-fid50k_full.jsonl", batch=100):
    """What Diff-Instruct and SiD leave: the name of a grid of samples says the thousands of images."""
    folder.mkdir(parents=True)
    (folder / "training_options.json").write_text(json.dumps({"batch_size": batch}))
    picture = "../x/fakes{:06d}.png" if "alpha" not in name else "fakes_1.200000_{:06d}.png"
    rows = [{"results": {"fid50k_full": fid}, "snapshot_pkl": picture.format(kimg)} for kimg, fid in fids]
    (folder / name).write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_diff_instructs_and_sids_files_give_the_same_curve_over_updates(tmp_path):
    points = [(0, 90.0), (10, 20.0), (20, 12.5)]
    di = edm_run(tmp_path / "di", points)
    sid = edm_run(tmp_path / "sid" / "00000-x", points, "metric-fid50k_full-alpha-1.200000.jsonl")
    assert COMPARE["curve"](di) == COMPARE["curve"](sid.parent) == [(0, 90.0), (100, 20.0), (200, 12.5)]


def test_dmd2s_statistics_and_what_its_script_prints_give_the_same_curve(tmp_path):
    (tmp_path / "a" / "time_1").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    stats = {"x/checkpoint_model_001000": {"fid": 30.5}, "x/checkpoint_model_002000/": {"fid": 20.25}}
    (tmp_path / "a" / "time_1" / "stats.json").write_text(json.dumps(stats))
    lines = [f"checkpoint {name} fid {each['fid']} patch fid 7.5\nstart fid eval" for name, each in stats.items()]
    (tmp_path / "b" / "fid.log").write_text("\n".join(lines))
    assert COMPARE["curve"](tmp_path / "a") == COMPARE["curve"](tmp_path / "b") == [(1000, 30.5), (2000, 20.25)]


def test_the_ratio_is_of_iterations_to_the_lowest_fid_that_both_reach_and_a_recording_is_paid(tmp_path, capsys):
    base = edm_run(tmp_path / "base", [(0, 100.0), (10, 50.0), (20, 10.0), (30, 10.0)])
    ours = edm_run(tmp_path / "disback", [(0, 100.0), (10, 10.0), (20, 8.0), (30, 9.0)])
    log = [{"update": 0, "begin": "attach", "path": "p"}, {"update": 0, "recording": 20, "loss": 1.0}]
    (tmp_path / "disback.path.log.jsonl").write_text("\n".join(map(json.dumps, log)))
    main([str(base), str(ours), "--png", str(tmp_path / "a.png")])
    page = capsys.readouterr().out
    assert "FID 10.000: 200 / 100 = " in page
    assert "  2.00 (2.50)" in page  # 200 / 100, and 200 / (100 - 20)
    assert "disback  9.000  8.000" in page
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_level_that_is_reached_at_once_has_no_ratio(tmp_path, capsys):
    runs = [edm_run(tmp_path / name, [(10, 3.0), (20, 2.0)]) for name in ("base", "other")]
    main([*map(str, runs), "--png", str(tmp_path / "a.png")])
    page = capsys.readouterr().out
    assert "FID 2.000: 200 / 200 =   1.00 (1.00)" in page
    assert "nan" not in page


@pytest.mark.parametrize("arguments", [["one"], []])
def test_one_run_alone_is_wrong_use(arguments):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)


def test_a_folder_without_a_fid_is_named(tmp_path):
    run = edm_run(tmp_path / "base", [(1, 2.0)])
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match=r"no FID in .*empty"):
        main([str(run), str(tmp_path / "empty")])


def test_the_length_of_the_ramp_is_three_times_f_of_a_finished_path(tmp_path, capsys):
    run = Run()
    with disback.attach(**run.roles(), path=tmp_path / "path", record=20, every=10) as handle:
        run.steps(4)
        with pytest.raises(SystemExit, match="is not finished"):
            main(["--ramp", str(tmp_path / "path")])
        run.steps(30)
        assert handle.phase != "recording"
    fitted = disback.DegradationPath(tmp_path / "path").manifest.updates_to_fit
    main(["--ramp", str(tmp_path / "path")])
    assert capsys.readouterr().out == f"{3 * fitted}\n"
