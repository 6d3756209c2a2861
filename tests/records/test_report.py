"""The tables and the JSON of a report: brief by block, in full by layer, the worst marked, and why a layer was kept."""

import json

import pytest

import normswap
from normswap.records.report import LayerFit, SiteFit, StreamError
from normswap.reporting.conversion_tables import (
    kept_layers,
    layers_table,
    scarce_rows,
    sites_table,
    stream_rows,
    stream_table,
)
from normswap.reporting.model_card import model_card
from normswap.tables import render

from ..models import family, images


def _stream(*errors: float, prefix: float | None = None) -> list[StreamError]:
    """Two writers a block, the second of each with the given error."""
    return [
        StreamError(f"blocks.{i}.{layer}", 2 * error, error, prefix, prefix)
        for i, error in enumerate(errors)
        for layer, error in (("attn.proj", error / 2), ("mlp.fc2", error))
    ]


def test_the_stream_has_one_row_a_block_or_one_a_layer():
    stream = [
        StreamError("patch_embed.proj", 0.1, 0.1),
        *_stream(0.1, 0.2, 0.3),
        StreamError("attn_pool.proj", 0.1, 0.1),
    ]
    brief = [row[0] for row in stream_rows(stream)]
    assert brief == ["patch_embed.proj", "blocks.0.mlp.fc2", "blocks.1.mlp.fc2", "blocks.2.mlp.fc2", "attn_pool.proj"]
    assert [row[0] for row in stream_rows(stream, every=True)] == [error.after for error in stream]
    assert stream_rows([]) == []


def test_the_last_number_of_a_path_is_its_block():
    stream = [StreamError(f"layers.{i}.blocks.{j}.mlp.fc2", 0.1, 0.1) for i in range(2) for j in range(2)]
    assert len(stream_rows(stream)) == 4


@pytest.mark.parametrize(
    ("errors", "marked"),
    [
        ([0.1, 0.2, 0.5, 0.6], [2]),
        ([0.5, 0.1, 0.2, 0.4], [0]),
        ([0.4, 0.4, 0.3, 0.2], [0]),
        ([0.1, 0.9], []),  # too few to tell one from another
        ([0.0] * 8, []),
        ([0.1, 0.2, 0.3, 0.8, 0.9, 1.5, 1.6, 1.7, 2.7, 2.8, 2.9, 3.0], [3, 5, 8]),
    ],
)
def test_rows_where_the_error_rises_most_are_marked(errors, marked):
    rows = stream_rows(_stream(*errors))
    assert [i for i, row in enumerate(rows) if row[-1]] == marked


def test_prefix_tokens_are_marked_too():
    stream = [StreamError(f"blocks.{i}.mlp.fc2", 0.1, 0.1, p, p) for i, p in enumerate((0.1, 0.2, 0.9, 0.9))]
    rows = stream_rows(stream)
    assert [bool(row[-1]) for row in rows] == [False, False, True, False]
    assert rows[2][1:5] == ["10.0", "10.0", "90.0", "90.0"]
    assert stream_rows(_stream(0.1))[0][3:5] == ["-", "-"]


def test_what_was_kept_is_counted_and_named():
    good = LayerFit("head", "reader", 100, 0.5, 0.9, 1e-3)
    kept = [LayerFit(f"blocks.{i}.mlp.fc2", "writer", 64, reason=f"want {i}") for i in range(5)]
    assert kept_layers([good]) == []
    assert kept_layers([good, kept[0]]) == ["1 of 2 layers kept their weights", "blocks.0.mlp.fc2: want 0"]
    lines = kept_layers([good, *kept])
    assert lines[0] == "5 of 6 layers kept their weights"
    assert lines[1:] == [*(f"blocks.{i}.mlp.fc2: want {i}" for i in range(3)), "and 2 more"]
    assert len(kept_layers([good, *kept], most=9)) == 6


def test_the_tables_say_everything():
    text = render(layers_table([LayerFit("head", "reader", 100, 0.5, 0.98765, 1e-4, 0.75)]))
    assert text.splitlines()[-1].split() == ["head", "reader", "100", "0.5000", "0.9877", "0.0001", "0.75"]
    text = render(layers_table([LayerFit("head", "reader", 9, reason="too few")]))
    assert text.splitlines()[-1].split() == ["head", "reader", "9", "-", "-", "-", "-", "kept:", "too", "few"]
    text = render(sites_table([SiteFit("norm", 100, 0.9, 0.8, 0.95, 0.7)]))
    assert text.splitlines()[-1].split() == ["norm", "100", "0.9000", "0.9500", "0.7000", "0.8000", "none"]
    lines = render(stream_table(_stream(0.25))).splitlines()
    assert "error of the residual stream" in lines[0]
    assert lines[-1].split() == ["blocks.0.mlp.fc2", "50.0", "25.0", "-", "-"]


@pytest.fixture(scope="module")
def report() -> normswap.ConversionReport:
    model = family("vit")
    return normswap.convert(model, [images(model, 40)]).report


def test_a_conversion_reports_every_site_and_layer(report):
    record = json.loads(json.dumps(report.to_json()))
    assert [fit["site"] for fit in record["fits"]] == [f"blocks.{i}.norm{j}" for i in (0, 1) for j in (1, 2)] + ["norm"]
    assert {fit["role"] for fit in record["layers"]} == {"reader", "writer"}
    assert [error["after"] for error in record["stream"]] == [
        f"blocks.{i}.{layer}" for i in (0, 1) for layer in ("attn.proj", "mlp.fc2")
    ]
    assert all(0 < error[key] < 2 for error in record["stream"] for key in ("patch", "prefix", "patch_before"))
    assert (record["method"], record["reconstruct"]) == ("reconstruct", "all")
    assert record["calibration_passes"] == record["seconds"]["calibrate"] / record["seconds"]["forward_pass"]


def test_other_methods_have_no_layers():
    model = family("vit")
    record = normswap.convert(
        model, [images(model, 8)], calibration=normswap.CalibrationOptions(method="channel")
    ).report.to_json()
    assert (record["reconstruct"], record["layers"], record["stream"]) == (None, [], [])
    assert len(record["fits"]) == 5


def test_the_cost_is_unknown_without_times(report):
    from dataclasses import replace

    assert replace(report, seconds={}).calibration_passes is None
    assert replace(report, seconds={"calibrate": 1.0, "forward_pass": 0.0}).calibration_passes is None
    assert replace(report, seconds={"calibrate": 1.0, "forward_pass": 0.5}).calibration_passes == 2


def test_the_card_shows_where_the_model_was_lost(report):
    card = model_card(report, {})
    for cells in stream_rows(report.stream):
        assert f"| {' | '.join(cells)} |" in card
    assert f"{report.calibration_passes:.1f} forward passes" in card
    assert all(f"- {line}" in card for line in kept_layers(report.layers))
    assert "1 of 9 layers kept their weights" in card  # the head reads 40 rows and has 48 inputs
    rows = [line for line in card.splitlines() if line.startswith("|")]
    assert {row.count("|") for row in rows} == {6, 7, 8}  # worst images have five columns, stages seven, the others six


def test_the_card_without_reconstruction():
    model = family("vit")
    card = model_card(
        normswap.convert(model, [images(model, 8)], calibration=normswap.CalibrationOptions(method="channel")).report,
        {},
    )
    assert "residual stream" not in card
    assert "kept their weights" not in card


def test_scarce_rows_say_how_many_images_are_wanted():
    enough = LayerFit("a", "writer", 2000, 0.5, 0.9, 0.1, inputs=100)
    head = LayerFit("head", "reader", 20, 0.5, 0.9, 0.1, inputs=100)  # one row an image; does not feed the stream
    short = LayerFit("b", "writer", 2000, 0.5, 0.9, 0.1, inputs=400)
    kept = LayerFit("c", "writer", 20, reason="too few", inputs=400)
    assert scarce_rows([enough, head, kept]) is None
    assert scarce_rows([]) is None
    assert scarce_rows([enough, short, kept]) == (
        "1 of 3 layers were solved from fewer than 10 rows per input (b: 2000 rows, 400 inputs): look at worst KL, "
        "or give 2.0 times the images"
    )
