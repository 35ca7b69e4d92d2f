"""What people see of ranks: callbacks, files, pictures and tables."""

import csv
import sys
import types

import keras
import numpy as np
import pytest
from moving import anew, take_a_step

from keras_geolora import GeoLoRA, plot_ranks
from keras_geolora.callbacks import (
    EpochCompaction,
    RankHistory,
    RankLogger,
    RankTensorBoard,
)
from keras_geolora.callbacks.reading import IntervalCallback
from keras_geolora.layers.tree import adapted_layers, walk
from keras_geolora.viewing.abbreviation import abbreviated
from keras_geolora.viewing.folding import fold, pattern_of
from keras_geolora.viewing.heat_map import heat_map
from keras_geolora.viewing.summary import as_text, totals

pytestmark = pytest.mark.filterwarnings("ignore:The last layer")

X = np.random.default_rng(0).normal(size=(64, 8)).astype("float32")
Y = np.tanh(X + X[:, ::-1])


def adapted(optimizer=None, widths=(8, 8, 8), **options):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input(widths[:1]),
            keras.layers.Dense(widths[1], activation="tanh", name="first"),
            keras.layers.Dense(widths[2], name="second"),
        ]
    )
    model.enable_geolora(**{"rank": 2, "max_rank": 4, "seed": 0, **options})
    compile_(model, optimizer)
    return model


def often_cut():
    return adapted(
        GeoLoRA(keras.optimizers.Adam(1e-2), tolerance=0.95, cut_interval=4)
    )


def fresh(create=adapted):
    """A new model, of which the step may be traced already."""
    model = anew(create)
    keras.utils.set_random_seed(0)
    return model


def compile_(model, optimizer=None):
    optimizer = optimizer or GeoLoRA(keras.optimizers.Adam(1e-2))
    model.compile(optimizer, loss="mse")


def fit(model, *callbacks, epochs=1, **options):
    options = {"batch_size": 8, "verbose": 0, **options}
    return model.fit(X, Y, epochs=epochs, callbacks=list(callbacks), **options)


def ranks_of(model):
    return {path: x.rank for path, x in adapted_layers(model).items()}


# Rank history.


def test_the_history_holds_the_ranks_of_every_layer_and_step():
    model, history = fresh(), RankHistory(interval=3)
    fit(model, history, epochs=2)
    assert history.steps == [0, 3, 6, 8, 9, 12, 15, 16]
    assert set(history.ranks) == {"first", "second"}
    assert all(ranks[0] == 2 for ranks in history.ranks.values())
    assert {p: r[-1] for p, r in history.ranks.items()} == ranks_of(model)


def test_the_history_ends_an_epoch_with_what_its_cut_has_left():
    model, history = fresh(often_cut), RankHistory(interval=7)
    fit(model, history)
    assert history.steps == [0, 7, 8]
    assert history.ranks["first"][-1] == 1 < history.ranks["first"][1]


def test_readings_keep_their_distance_where_keras_does_several_steps_at_once():
    class Counter(IntervalCallback):
        readings = 0

        def read(self, step):
            self.readings += 1

    counter = Counter(interval=3)
    counter.set_model(adapted())
    counter.on_train_begin()
    counter.on_epoch_begin(0)
    counts = []
    for batch in range(1, 16, 2):
        counter.on_train_batch_end(batch)
        counts.append(counter.readings)
    # The first is before the first batch; 4, 6, 10, 12, 16 batches are done.
    assert counts == [1, 2, 3, 3, 4, 5, 5, 6]


def test_a_second_fit_goes_on_with_the_history():
    model, history = fresh(), RankHistory()
    fit(model, history)
    fit(model, history)
    assert history.steps == [0, 8, 16]


def test_the_history_survives_buffers_that_shrink():
    model, history = often_cut(), RankHistory()
    fit(model, history, EpochCompaction(multiple=1), epochs=2)
    assert adapted_layers(model)["first"].adapter.max_rank == 1
    assert history.ranks["first"][1:] == [1, 1]


def test_layers_come_and_go():
    model, history = adapted(targets="first"), RankHistory()
    fit(model, history)
    model.enable_geolora(rank=1, targets="second", name="other")
    compile_(model)
    model.optimizer.iterations.assign(8)
    fit(model, history)
    assert history.steps == [0, 8, 16]
    assert history.ranks["second"][0] is None
    assert history.ranks["first"][-1] is None
    assert history.ranks["second"][-1] == ranks_of(model)["second"]


def test_a_training_that_starts_anew_replaces_the_history():
    history = RankHistory()
    fit(fresh(), history, epochs=2)
    fit(adapted(rank=1), history)
    assert history.steps == [0, 8] and history.ranks["first"][0] == 1


def test_files_are_written_at_the_end_of_every_epoch(tmp_path):
    table, picture = tmp_path / "ranks.csv", tmp_path / "ranks.png"
    history = RankHistory(table, heat_map=picture)

    class Interrupt(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(fresh(), history, Interrupt(), epochs=2)
    with open(table, newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["step", "first", "second"]
    assert [row[0] for row in rows[1:]] == ["0", "8"]
    assert rows[1][1:] == ["2", "2"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "ranks.csv",
        "ranks.png",
    ]


def test_a_training_resumed_in_another_process_goes_on_with_the_file(tmp_path):
    whole = RankHistory()
    fit(fresh(), whole, epochs=2)

    def backup():
        return keras.callbacks.BackupAndRestore(tmp_path / "backup")

    class Crash(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 1:
                raise InterruptedError

    file = tmp_path / "ranks.csv"
    with pytest.raises(InterruptedError):
        fit(fresh(), RankHistory(file), Crash(), backup(), epochs=2)
    resumed = RankHistory(file)
    fit(adapted(), resumed, backup(), epochs=2)
    assert resumed.steps == whole.steps
    assert resumed.ranks == whole.ranks


def test_a_foreign_file_is_refused_where_a_training_is_resumed(tmp_path):
    file = tmp_path / "ranks.csv"
    file.write_text("epoch,loss\n0,0.5\n")
    model = fresh()
    fit(model)
    with pytest.raises(ValueError, match="first column is 'epoch'"):
        fit(model, RankHistory(file))


@pytest.mark.parametrize("interval", [0, -1, 2.5, True, "epoch"])
@pytest.mark.parametrize("callback", [RankHistory, RankLogger, RankTensorBoard])
def test_what_is_no_interval_is_refused(callback, interval):
    with pytest.raises(ValueError, match=f"Received: interval={interval!r}"):
        callback(interval=interval)


@pytest.mark.parametrize("argument", ["filename", "heat_map"])
def test_a_folder_that_does_not_exist_is_refused_at_once(argument, tmp_path):
    missing = tmp_path / "missing" / "ranks.png"
    with pytest.raises(ValueError, match=f"Received: {argument}='{missing}'"):
        RankHistory(**{argument: missing})


def test_a_model_without_adapters_has_no_history():
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(8)])
    compile_(model, keras.optimizers.Adam())
    with pytest.raises(ValueError, match="Received: model '.*' without an ad"):
        fit(model, RankHistory())


# Heat map.


def layers_of(number):
    kinds = ("self_attention_layer/query", "feedforward_output_dense")
    return [
        f"backbone/transformer_layer_{i}/{kind}"
        for i in range(number)
        for kind in kinds
    ]


def ranks_like(layers, readings):
    rng = np.random.default_rng(0)
    return types.SimpleNamespace(
        steps=[20 * i for i in range(readings)],
        ranks={p: rng.integers(1, 17, readings).tolist() for p in layers},
    )


def texts_in_cells(history):
    table = np.array(list(history.ranks.values()), "float")
    figure = heat_map(history.steps, list(history.ranks), table)
    return figure, [text.get_text() for text in figure.axes[0].texts]


def test_the_heat_map_says_every_rank_as_a_number():
    history = ranks_like(layers_of(2), 5)
    figure, texts = texts_in_cells(history)
    assert texts == [str(r) for rs in history.ranks.values() for r in rs]
    labels = [x.get_text() for x in figure.axes[0].get_xticklabels()]
    assert labels == ["0", "20", "40", "60", "80"]


def test_a_long_history_shows_its_first_and_last_readings():
    history = ranks_like(layers_of(2), 501)
    figure, texts = texts_in_cells(history)
    assert len(texts) == 4 * 24
    labels = [x.get_text() for x in figure.axes[0].get_xticklabels()]
    assert labels[0] == "0" and labels[-1] == "10000"
    assert "24 of 501 readings" in figure.axes[0].get_xlabel()


def test_cells_without_an_adapter_stay_empty():
    history = ranks_like(["a", "b"], 2)
    history.ranks["b"][0] = None
    assert len(texts_in_cells(history)[1]) == 3


@pytest.mark.filterwarnings("error")
def test_numbers_stay_legible_with_many_layers():
    figure, _ = texts_in_cells(ranks_like(layers_of(36), 500))
    renderer = figure.canvas.get_renderer()
    figure.draw(renderer)
    axes = figure.axes[0]
    cell = axes.transData.transform([(0, 0), (1, 1)])
    width, height = abs(cell[1] - cell[0])
    for text in axes.texts[:24]:
        box = text.get_window_extent(renderer)
        assert box.width < width and box.height < height


def test_dark_cells_have_light_numbers():
    history = types.SimpleNamespace(steps=[0, 1], ranks={"a": [1, 16]})
    figure, _ = texts_in_cells(history)
    low, high = figure.axes[0].texts
    assert (low.get_color(), high.get_color()) == ("black", "white")


def test_a_table_that_was_written_can_be_drawn(tmp_path):
    model, table = fresh(), tmp_path / "ranks.csv"
    fit(model, RankHistory(table))
    plot_ranks(table, tmp_path / "a.png", title="Mine")
    plot_ranks(str(table), str(tmp_path / "b.png"), title="Mine")
    a, b = (tmp_path / name for name in ("a.png", "b.png"))
    assert a.read_bytes() == b.read_bytes()


def test_drawing_leaves_the_pictures_of_others_alone(tmp_path):
    from matplotlib import pyplot

    before = pyplot.get_fignums(), pyplot.get_backend()
    plot_ranks(ranks_like(["a"], 2), tmp_path / "ranks.png")
    assert (pyplot.get_fignums(), pyplot.get_backend()) == before


def test_only_a_png_file_is_drawn(tmp_path):
    with pytest.raises(ValueError, match="Received: '.*ranks.pdf'"):
        plot_ranks(ranks_like(["a"], 2), tmp_path / "ranks.pdf")
    with pytest.raises(ValueError, match="must end in '.png'"):
        RankHistory(heat_map=tmp_path / "ranks.jpg")


def test_a_history_without_readings_is_not_drawn(tmp_path):
    with pytest.raises(ValueError, match="with 0 readings"):
        RankHistory().plot(tmp_path / "ranks.png")


def test_a_folder_that_is_gone_is_reported(tmp_path):
    with pytest.raises(FileNotFoundError, match="could not be written"):
        plot_ranks(ranks_like(["a"], 2), tmp_path / "gone" / "ranks.png")


def test_without_matplotlib_the_extra_is_named_at_once(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    words = r'pip install "keras_geolora\[plot\]"'
    with pytest.raises(ModuleNotFoundError, match=words):
        RankHistory(heat_map=tmp_path / "ranks.png")
    with pytest.raises(ModuleNotFoundError, match=words):
        plot_ranks(ranks_like(["a"], 2), tmp_path / "ranks.png")


# Paths in columns.


def test_short_paths_stay_as_they_are():
    assert abbreviated(["a/query", "a/value"], 8) == (
        "",
        ["a/query", "a/value"],
    )


def test_long_paths_lose_what_is_common_first():
    common, names = abbreviated(layers_of(2), 50)
    assert common == "backbone/"
    assert names[0] == "transformer_layer_0/self_attention_layer/query"


@pytest.mark.parametrize("width", [10, 24, 40])
def test_shortened_paths_stay_different_and_keep_their_numbers(width):
    paths = layers_of(12)
    _, names = abbreviated(paths, width)
    assert len(set(names)) == len(paths)
    assert all(f"_{i // 2}/" in name for i, name in enumerate(names))
    assert width < 20 or max(map(len, names)) <= width


def test_paths_that_could_not_be_told_apart_stay_long():
    paths = ["block/attention_first", "block/attention_firearm"]
    assert abbreviated(paths, 5) == (
        "block/",
        ["atte_first", "atte_fire"],
    )


# TensorBoard.


def events_of(folder):
    from tensorboard.backend.event_processing import event_accumulator

    sizes = {"scalars": 0, "histograms": 0}
    events = event_accumulator.EventAccumulator(str(folder / "geolora"), sizes)
    return events.Reload()


def scalars(events, tag):
    return [(e.step, e.value) for e in events.Scalars(tag)]


def test_tensorboard_gets_ranks_spectra_and_health(tmp_path):
    model = fresh()
    board = RankTensorBoard(tmp_path, interval=4)
    fit(model, board, RankHistory(), epochs=2)
    events, ranks = events_of(tmp_path), ranks_of(model)
    mean = np.mean(list(ranks.values()))
    assert scalars(events, "geolora/mean_rank")[0] == (0, 2)
    assert scalars(events, "geolora/mean_rank")[-1] == (16, mean)
    assert scalars(events, "geolora/total_rank")[-1][1] == sum(ranks.values())
    assert scalars(events, "geolora/skipped_steps")[-1] == (16, 0)
    rows = model.geolora_summary(print_fn=None)
    parameters = sum(row["parameters"] for row in rows)
    assert scalars(events, "geolora/parameters")[-1][1] == parameters
    for row in rows:
        path = row["path"]
        assert scalars(events, f"rank/{path}")[-1] == (16, ranks[path])
        discarded = scalars(events, f"discarded_share/{path}")
        assert [step for step, _ in discarded] == [8, 16]
        assert discarded[-1][1] == pytest.approx(row["discarded_share"])
        (_, error) = scalars(events, f"orthogonality_error/{path}")[-1]
        assert error == pytest.approx(row["orthogonality_error"])
        histogram = events.Histograms(f"singular_values/{path}")[-1]
        assert histogram.step == 16
        assert histogram.histogram_value.num == row["rank"]
        assert histogram.histogram_value.max == pytest.approx(
            row["singular_values"][0]
        )


def test_tensorboard_counts_steps_that_were_not_finite(tmp_path):
    model = fresh()
    bad = np.where(np.arange(64)[:, None] == 0, np.nan, Y)
    board = RankTensorBoard(tmp_path)
    model.fit(X, bad, batch_size=8, shuffle=False, callbacks=[board], verbose=0)
    assert scalars(events_of(tmp_path), "geolora/skipped_steps")[-1][1] == 1


@pytest.mark.parametrize("freq, steps", [(0, []), (2, [8, 24])])
def test_histograms_come_as_often_as_asked(freq, steps, tmp_path):
    board = RankTensorBoard(tmp_path, histogram_freq=freq)
    fit(fresh(), board, epochs=3)
    events = events_of(tmp_path)
    tag = "singular_values/first"
    found = events.Histograms(tag) if steps else events.Tags()["histograms"]
    assert [e.step for e in found] == steps


def test_tensorboard_goes_on_after_a_second_fit(tmp_path):
    model, board = fresh(), RankTensorBoard(tmp_path)
    fit(model, board)
    fit(model, board)
    found = scalars(events_of(tmp_path), "geolora/mean_rank")
    assert sorted({step for step, _ in found}) == [0, 8, 16]


def test_what_a_broken_run_wrote_of_later_steps_is_hidden(tmp_path):
    fit(fresh(), RankTensorBoard(tmp_path), epochs=3)
    fit(fresh(), RankTensorBoard(tmp_path))
    found = scalars(events_of(tmp_path), "geolora/mean_rank")
    assert sorted({step for step, _ in found}) == [0, 8]


@pytest.mark.parametrize("freq", [-1, 1.5, "epoch"])
def test_what_is_no_number_of_epochs_is_refused(freq):
    with pytest.raises(ValueError, match="Received: histogram_freq="):
        RankTensorBoard(histogram_freq=freq)


def test_without_tensorboardx_the_extra_is_named_at_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    words = r'pip install "keras_geolora\[tensorboard\]"'
    with pytest.raises(ModuleNotFoundError, match=words):
        RankTensorBoard()


# What Keras' own callbacks see.


def test_the_csv_logger_has_columns_for_ranks_and_skipped_steps(tmp_path):
    file = tmp_path / "log.csv"
    model = fresh()
    history = fit(model, keras.callbacks.CSVLogger(file), epochs=2).history
    with open(file, newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [float(r["mean_rank"]) for r in rows] == history["mean_rank"]
    assert [float(r["skipped_steps"]) for r in rows] == [0, 0]
    assert history["mean_rank"][-1] == np.mean(list(ranks_of(model).values()))


def test_it_does_not_matter_where_a_rank_logger_stands(tmp_path):
    file = tmp_path / "log.csv"
    callbacks = [keras.callbacks.CSVLogger(file), RankLogger(interval=1)]
    history = fit(fresh(often_cut), *callbacks).history
    assert "mean_rank" in file.read_text() and history["mean_rank"] == [1]


def test_the_mean_rank_is_fresh_where_keras_does_several_steps_at_once(
    monkeypatch,
):
    model, logger, logs = fresh(), RankLogger(interval=2), {}
    fit(model)
    logger.set_model(model)
    logger.on_train_begin()
    logger.on_epoch_begin(0)
    before = np.mean(list(ranks_of(model).values()))
    monkeypatch.setattr(model.optimizer, "tolerance", 0.9)
    model.optimizer.cut()
    logger.on_train_batch_end(3, logs)  # the fourth batch, the first time
    assert logs["mean_rank"] == np.mean(list(ranks_of(model).values()))
    assert logs["mean_rank"] < before


def test_a_checkpoint_may_be_named_after_the_mean_rank(tmp_path):
    name = tmp_path / "{epoch}-{mean_rank:.1f}.weights.h5"
    checkpoint = keras.callbacks.ModelCheckpoint(name, save_weights_only=True)
    fit(fresh(often_cut), checkpoint, validation_split=0.25)
    assert [p.name for p in tmp_path.iterdir()] == ["1-1.0.weights.h5"]


# Summary.


def printed(model, **options):
    lines = []
    rows = model.geolora_summary(print_fn=lines.append, **options)
    return rows, lines


def test_the_summary_draws_ranks_and_spectra():
    model = fresh()
    fit(model)
    rows, lines = printed(model)
    for row, line in zip(rows, lines[3:], strict=False):
        sigma = row["singular_values"]
        path, _, rank, bars, largest, smallest, *_ = line.split()
        assert path == row["path"] and rank == f"{row['rank']}/4"
        assert len(bars) == 4 and bars[0] == "█"
        assert bars.count("·") == 4 - row["rank"]
        assert float(largest) == pytest.approx(sigma[0], rel=0.05)
        assert float(smallest) == pytest.approx(sigma[-1], rel=0.05)


def test_shares_add_up():
    model = fresh()
    fit(model)
    rows, lines = printed(model)
    assert sum(row["parameter_share"] for row in rows) == pytest.approx(1)
    assert {row["budget_share"] for row in rows} == {None}
    assert lines[1].endswith("share")


@pytest.mark.parametrize("unit", ["rank", "parameter"])
@pytest.mark.parametrize("scheduled", [False, True])
def test_the_summary_shows_how_much_of_a_budget_is_used(unit, scheduled):
    budget = {"rank": 5, "parameter": 80}[unit]
    option = (lambda updates: budget) if scheduled else budget
    optimizer = GeoLoRA("adam", 0.0, **{f"{unit}_budget": option})
    model = take_a_step(adapted(optimizer), X[:8], Y[:8])
    rows, lines = printed(model)
    used = [row["rank" if unit == "rank" else "parameters"] for row in rows]
    shares = [row["budget_share"] for row in rows]
    np.testing.assert_allclose(shares, np.array(used) / budget)
    assert lines[1].endswith("budget")
    assert any(
        line.startswith(f"Budget: {sum(used)} of {budget} {unit}s in use")
        for line in lines
    )


@pytest.mark.parametrize("budget", [float("inf"), 2**40])
def test_without_a_budget_yet_there_is_no_share_of_it(budget):
    optimizer = GeoLoRA("adam", 0.0, rank_budget=lambda updates: budget)
    rows, lines = printed(take_a_step(adapted(optimizer), X[:8], Y[:8]))
    assert {row["budget_share"] for row in rows} == {None}
    assert lines[1].endswith("share")


def test_a_schedule_below_the_floor_means_the_floor():
    optimizer = GeoLoRA("adam", rank_budget=lambda updates: 1)
    rows, _ = printed(take_a_step(adapted(optimizer), X[:8], Y[:8]))
    assert [row["budget_share"] for row in rows] == [0.5, 0.5]


def test_the_summary_compares_with_lora_of_the_same_ranks():
    model = adapted(
        widths=(12, 16, 6), rank_pattern={"first": 1, "second": 4}, max_rank=4
    )
    _, lines = printed(model)
    # Kernels of 12 x 16 and 16 x 6; the mean is 2.5, which is rounded to even.
    assert "LoRA with rank 2 on the same layers (the mean): 100 p" in str(lines)
    largest = "LoRA with rank 4 on the same layers (the largest found): 200 p"
    assert largest in str(lines)


def test_what_was_dropped_is_unknown_before_training():
    assert {r["discarded_share"] for r in printed(adapted())[0]} == {None}
    model = fresh()
    fit(model)
    shares = [row["discarded_share"] for row in printed(model)[0]]
    assert all(0 <= share < 1 for share in shares)


def test_the_optimizer_of_a_custom_loop_can_be_given():
    model = fresh()
    fit(model)
    plain = keras.Sequential([keras.Input((8,)), *model.layers])
    assert {r["discarded_share"] for r in printed(plain)[0]} == {None}
    rows, _ = printed(plain, optimizer=model.optimizer)
    assert None not in {row["discarded_share"] for row in rows}


def test_a_summary_for_a_page_is_a_markdown_table():
    rows, lines = printed(adapted(), style="markdown")
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == len(rows) + 2
    assert len({line.count("|") for line in table}) == 1
    assert "`first`" in table[2] and set(table[1]) <= set("|-: ")


@pytest.mark.parametrize("style", ["html", None, ""])
def test_a_style_that_is_unknown_is_refused(style):
    with pytest.raises(ValueError, match=f"Received: style={style!r}"):
        adapted().geolora_summary(style=style)


@pytest.mark.parametrize("expand", ["all", None, 2])
def test_what_cannot_be_expanded_is_refused(expand):
    with pytest.raises(ValueError, match=f"Received: expand={expand!r}"):
        adapted().geolora_summary(expand=expand)


class Experts(keras.layers.Layer):
    def build(self, shape):
        self.maps = self.add_weight(name="maps", shape=(3, 8, 8))

    def call(self, x):
        return keras.ops.sum(keras.ops.einsum("bi,eio->ebo", x, self.maps), 0)


def test_experts_have_rows_of_their_own_on_request():
    model = keras.Sequential(
        [
            keras.Input((8,)),
            Experts(name="experts"),
            keras.layers.Dense(8, name="dense"),
        ]
    )
    model.enable_geolora(2, targets="all-linear", seed=0)
    compile_(model, GeoLoRA(keras.optimizers.Adam(1e-2), rank_budget=8))
    take_a_step(model, X, Y)
    adapter = adapted_layers(model)["experts/maps"].adapter
    U, S, V = (np.array(x) for x in adapter.trimmed())
    U[1, :, 1:] = S[1, 1:] = S[1, :, 1:] = V[1, :, 1:] = 0
    S[0, 0, 0], S[2, 0, 0] = 0.5, 3.0
    adapter.assign_factors(U, S, V)
    rows, lines = printed(model, expand="experts", style="markdown")
    assert [row["path"] for row in rows] == ["experts/maps", "dense"]
    assert rows[0]["experts"] == 3 and rows[0]["ranks"] == [2, 1, 2]
    table = [line for line in lines if line.startswith("| `")]
    cells = [[cell.strip(" `") for cell in x.split("|")[1:]] for x in table]
    assert [row[0] for row in cells] == [
        *(f"experts/maps[{i}]" for i in range(3)),
        "dense",
    ]
    assert [row[2] for row in cells[:3]] == ["2/4", "1/4", "2/4"]
    assert cells[0][4] == "0.50" and cells[2][4] == "3.0"
    assert [row[7] for row in cells[:3]] == ["34", "17", "34"]
    assert [row[8] for row in cells[:3]] == ["25.0%", "12.5%", "25.0%"]


def row_of(path, rank=16, shape=(768, 3072), **changed):
    return {
        "path": path,
        "kernel_shape": shape,
        "experts": None,
        "rank": rank,
        "ranks": [rank],
        "max_rank": 16,
        "parameters": rank * (sum(shape) + 1),
        "singular_values": [0.1] * rank,
        "orthogonality_error": 1e-7,
        "discarded_share": 0.05,
        "parameter_share": 0.01,
        "budget_share": None,
        **changed,
    }


@pytest.mark.parametrize("shown", [list, fold])
def test_the_table_fits_a_terminal(shown):
    rows = list(map(row_of, layers_of(12)))
    sentences = totals(rows, None, "parameters")
    assert max(map(len, as_text(shown(rows), "model", sentences))) <= 120


def blocks(number, **options):
    """A model with a block that repeats, of two layers, and one other layer."""
    keras.utils.set_random_seed(0)

    def block(i):
        layers = [
            keras.layers.Dense(8, name="up"),
            keras.layers.Dense(8, name="down"),
        ]
        return keras.Sequential([keras.Input((8,)), *layers], name=f"block_{i}")

    model = keras.Sequential(
        [
            keras.Input((8,)),
            *map(block, range(number)),
            keras.layers.Dense(8, name="head"),
        ]
    )
    model.enable_geolora(**{"rank": 2, "max_rank": 4, **options})
    return model


def table_of(lines):
    """The names and the other texts of a table that was printed."""
    rules = [i for i, line in enumerate(lines) if set(line) == {"-"}]
    cells = [line.split() for line in lines[rules[0] + 1 : rules[1]]]
    return {name: texts for name, *texts in cells}


def test_a_block_that_repeats_has_a_line_for_each_kind_of_layer():
    ranks = {f"block_{i}/up": 1 + i % 4 for i in range(6)}
    model = blocks(6, rank=4, rank_pattern=ranks)
    rows, lines = printed(model)
    assert len(rows) == 13 and "13 layers of 3 kinds" in lines[0]
    table = table_of(lines)
    assert list(table) == [".*/up", ".*/down", "head"]
    number, kernel, rank, mean, *_ = table[".*/up"]
    # 1, 2, 3, 4, 1, 2
    assert (number, kernel, rank, mean) == ("6", "8x8", "1-4/4", "2.2")
    assert table["head"][:4] == ["1", "8x8", "4/4", "4.0"]
    _, lines = printed(model, style="markdown")
    assert lines[4].startswith("| `.*/up` | 6 | 8x8 | 1-4/4 | 2.2 |")


def test_every_layer_has_a_line_on_request():
    rows, lines = printed(blocks(6), expand=True)
    assert list(table_of(lines)) == [row["path"] for row in rows]


def test_a_small_model_is_not_folded():
    rows, lines = printed(blocks(5))
    assert list(table_of(lines)) == [row["path"] for row in rows]


@pytest.mark.parametrize("targets", ["all", ["block_[02].*", "head"]])
def test_names_of_folded_lines_are_patterns_of_their_layers(targets):
    model = blocks(14, targets=targets)
    known = [path for path, _ in walk(model)]
    for row in fold(model.geolora_summary(print_fn=None), known):
        other = blocks(14, targets=row["path"])
        assert len(adapted_layers(other)) == row["number"]


def test_a_folded_line_sums_up_its_layers():
    rows = [row_of("a_0/x", 3), row_of("a_1/x", 2), row_of("a_2/x", 1)]
    rows[1]["singular_values"] = [0.4, 0.1]
    (kind,) = fold(rows)
    assert kind["ranks"] == (1, 3) and kind["mean_rank"] == 2
    assert kind["parameters"] == 6 * (768 + 3072 + 1)
    assert kind["parameter_share"] == pytest.approx(0.03)
    assert kind["singular_values"] == pytest.approx([0.2, 0.2 / 3, 0.1 / 3])
    assert kind["largest"] == 0.4 and kind["budget_share"] is None
    rows[0]["discarded_share"] = None
    assert fold(rows)[0]["discarded_share"] is None


def test_kernels_of_other_shapes_are_other_kinds():
    rows = [row_of(f"block_{i}", shape=(8, 8 * (1 + i // 2))) for i in range(4)]
    found = {kind["path"]: kind["number"] for kind in fold(rows)}
    assert found == {"block_(0|1)": 2, "block_(2|3)": 2}


def test_layers_that_no_pattern_can_tell_apart_stay_alone():
    diagonal = [row_of("a_0/b_0"), row_of("a_1/b_1")]
    others = [row_of("a_0/b_1", shape=(8, 8))]
    kinds = fold(diagonal + others)
    assert [kind["number"] for kind in kinds] == [1, 1, 1]
    assert kinds[0]["path"] == ".*/b_0"


@pytest.mark.parametrize(
    "others, pattern",
    [
        ([], ".*/query"),
        (["head/query"], r".*/block_\d+/query"),
        (["side/block_0/query"], r"main/block_\d+/query"),
        (["main/block_7/query"], r".*/block_(0|1)/query"),
    ],
)
def test_a_pattern_is_as_short_as_other_layers_allow(others, pattern):
    paths = ["main/block_0/query", "main/block_1/query"]
    assert pattern_of(paths, [*paths, *others]) == pattern


def test_names_with_signs_of_expressions_are_patterns_too():
    (kind,) = fold([row_of("up(1)/a.b")], ["up(1)/acb"])
    assert kind["path"] == r".*/a\.b"


def half_adapted():
    model = keras.Sequential([keras.Input((8,))], name="net")
    model.add(keras.layers.Dense(8, use_bias=False, name="left"))
    model.add(keras.layers.Dense(8, use_bias=False, name="adapted"))
    return model.enable_geolora(rank=1, targets="adapted")


def test_the_summary_names_what_no_adapter_reaches():
    lines = []
    half_adapted().geolora_summary(print_fn=lines.append)
    (line,) = (line for line in lines if line.startswith("No adapter reaches"))
    assert "50.0% of the 128 parameters" in line
    assert line.endswith("The largest: net/left/kernel (64).")
    whole = keras.Sequential(
        [keras.Input((8,)), keras.layers.Dense(8, use_bias=False)]
    ).enable_geolora(rank=1)
    whole.geolora_summary(print_fn=lines.append)
    assert lines[-1] == "Every parameter trains or has an adapter."


def test_the_first_fit_says_once_what_no_adapter_reaches(capsys):
    model = half_adapted()
    model.compile(GeoLoRA("sgd"), loss="mse")
    x = np.ones((4, 8), "float32")
    for verbose, times in ((0, 0), (2, 1), (2, 0)):
        model.fit(x, x, verbose=verbose)
        assert capsys.readouterr().out.count("No adapter reaches") == times


def test_singular_values_are_positive_whatever_the_scale():
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    model.enable_geolora(rank=2, scale=-2.0)
    model.layers[0].adapter.S.assign(np.diag([3.0, 1.0, 0.0, 0.0]))
    (row,) = model.geolora_summary(print_fn=None)
    assert row["singular_values"] == [6.0, 2.0]
