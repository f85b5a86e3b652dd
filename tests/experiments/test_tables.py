"""Table, chart and report of a comparison whose runs are made up."""

import json
import shutil

import pytest
from matplotlib import pyplot as plt

from mmkd.experiments import tables
from mmkd.experiments.charts import chart, short
from mmkd.experiments.discovery import Method
from mmkd.experiments.report import write_comparison


def cells(results, column):
    return {row['method']: row[column] for row in tables.rows(results)}


def test_the_table_has_what_the_runs_left(tmp_path, fabricate, gid, cwd):
    results = fabricate(tmp_path, (gid, cwd)).results()
    assert json.loads(json.dumps(results)) == results
    assert (results['missing'], results['failed']) == ({}, {})
    assert list(cells(results, 'AP').items()) == [
        ('student alone', '0.120 ± 0.028'),
        ('teacher', '0.380'),
        ('gid_retinanet', '0.250 ± 0.071'),  # the best first
        ('cwd_retinanet', '0.120 ± 0.028'),
    ]
    (row,) = [row for row in tables.rows(results) if row['method'] == 'gid_retinanet']
    assert row == {
        'method': 'gid_retinanet',
        'student': 'retinanet',
        'teacher': 'retinanet',
        'AP': '0.250 ± 0.071',
        'AP of seeds': '0.200 0.300',
        'gain': '+0.130',
        'SE': '0.054',
        'gain / SE': '2.4',
        '> 2 SE': 'yes',
        'gap closed': '50 %',
        'step time': '1.00',
    }
    line = '| gid_retinanet | retinanet | retinanet | 0.250 ± 0.071 | 0.200 0.300 | +0.130 |'
    assert line in tables.markdown(results)


def test_one_seed_has_no_spread(tmp_path, fabricate, gid):
    results = fabricate(tmp_path, (gid,), seeds=(0,)).results()
    (row,) = [row for row in tables.rows(results) if row['method'] == 'gid_retinanet']
    assert [row[column] for column in ('AP', 'gain', 'SE', 'gain / SE', '> 2 SE')] == ['0.200', '+0.100', '', '', '']
    write_comparison(results, tmp_path / 'report')
    assert (tmp_path / 'report' / 'chart.png').stat().st_size > 10_000


def test_missing_and_failed_runs_are_named_and_left_out(tmp_path, fabricate, gid, cwd):
    made = fabricate(tmp_path, (gid, cwd))
    run = made.runs['gid_retinanet'][1]
    run.checkpoint.unlink()
    for each in made.runs['cwd_retinanet'].values():
        shutil.rmtree(each.folder)
    results = made.results()
    assert cells(results, 'AP of seeds')['gid_retinanet'] == '0.200 -'
    assert cells(results, 'gain')['gid_retinanet'] == '+0.100'
    assert cells(results, 'AP')['cwd_retinanet'] == 'not finished'
    assert set(tables.notes(results)) == {
        'Missing: cwd_retinanet: not begun',
        'Missing: gid_retinanet: seed 1 stopped after iteration 600',
    }
    failed = made.results({str(run.folder): 'gid_retinanet, seed 1 failed: it is broken'})
    assert tables.notes(failed)[0] == 'Failed: gid_retinanet, seed 1 failed: it is broken'
    assert not any('seed 1 stopped' in note for note in tables.notes(failed))


def test_without_a_student_alone_or_a_teacher_there_is_no_gain_but_a_report(tmp_path, fabricate, gid):
    made = fabricate(tmp_path, (gid,))
    for run in [*made.runs['retinanet_student'].values(), *made.teachers.values()]:
        run.checkpoint.unlink()
    results = made.results()
    assert cells(results, 'AP')['gid_retinanet'] == '0.250 ± 0.071'
    assert cells(results, 'AP')['teacher'] == 'not finished'
    assert cells(results, 'gain')['gid_retinanet'] == cells(results, 'step time')['gid_retinanet'] == ''
    assert write_comparison(results, tmp_path / 'report').is_file()


def test_a_teacher_from_elsewhere_was_not_measured(tmp_path, fabricate, gid):
    made = fabricate(tmp_path, (gid,))
    results = made.results()
    results['methods']['gid_retinanet']['teachers'] = ['mmdet::retinanet/retinanet_r101_fpn_2x_coco.py']
    assert cells(results, 'teacher')['gid_retinanet'] == 'retinanet_r101_fpn_2x_coco'
    assert cells(results, 'AP')['teacher'] == 'not measured'
    labels = [line.get_label() for line in chart(results).axes[0].lines]
    assert not any('teacher' in label for label in labels)


def test_the_chart_has_a_panel_per_student_with_bars_and_lines(tmp_path, fabricate, gid, cwd):
    fcos = Method('gid_fcos', 'fcos_student', {'model.teacher': 'fcos_teacher'})
    figure = chart(fabricate(tmp_path, (fcos, gid, cwd)).results())
    of_fcos, of_retinanet = figure.axes
    assert [text.get_text() for text in of_retinanet.get_yticklabels()] == ['gid  +0.130', 'cwd  +0.000']
    assert [bar.get_width() for bar in of_retinanet.patches[:2]] == pytest.approx([0.25, 0.12])
    errors = [line for bars in of_retinanet.containers if hasattr(bars, 'has_xerr') for line in bars.lines[2]]
    (first,), _ = (each.get_segments() for each in errors)
    assert first[:, 0] == pytest.approx([0.25 - 0.005**0.5, 0.25 + 0.005**0.5])
    labels = {line.get_label(): line.get_xdata()[0] for line in of_fcos.lines if not line.get_label().startswith('_')}
    assert labels == pytest.approx({'student alone 0.120': 0.12, 'fcos teacher 0.380': 0.38})
    assert of_retinanet.get_xlim()[1] > 0.38


def test_the_chart_is_wide_enough_for_long_names_and_there_may_be_nothing_to_show(tmp_path, fabricate, gid):
    made = fabricate(tmp_path, (gid,))
    results = made.results()
    assert chart(results).get_figwidth() == 9
    long = 'a_method_with_a_name_' * 5
    results['methods'] = {long: results['methods']['gid_retinanet']}
    figure = chart(results)
    figure.draw_without_rendering()
    assert figure.axes[0].get_window_extent().width / figure.dpi > 3
    assert min(label.get_window_extent().x0 for label in figure.axes[0].get_yticklabels()) >= 0
    for of_seed in made.runs.values():
        for run in of_seed.values():
            run.checkpoint.unlink()
    assert [axis.get_title(loc='left') for axis in chart(made.results()).axes] == ['no finished run']


def test_a_methods_label_does_not_repeat_its_student():
    assert short('gid_retinanet', 'retinanet_student') == short('retinanet_gid', 'retinanet_student') == 'gid'
    assert short('gid', 'small') == 'gid'


def test_the_report_is_written_and_its_picture_is_not_blank(tmp_path, fabricate, gid):
    results = fabricate(tmp_path, (gid,)).results({'x': 'x failed: <b>'})
    report = write_comparison(results, tmp_path / 'report')
    picture = plt.imread(tmp_path / 'report' / 'chart.png')
    assert picture.shape[0] > 200
    assert picture.shape[1] > 1000
    assert 0.02 < (picture[..., :3].min(-1) < 0.95).mean() < 0.9  # ink
    page = report.read_text()
    assert 'data:image/svg+xml;base64,' in page
    assert '<td>gid_retinanet</td>' in page
    assert 'Failed: x failed: &lt;b&gt;' in page
    assert json.loads((tmp_path / 'report' / 'results.json').read_text()) == results
    assert (tmp_path / 'report' / 'table.md').read_text() == tables.markdown(results)


def test_a_wide_table_is_not_cut_off_in_the_terminal(tmp_path, fabricate, gid, capsys):
    results = fabricate(tmp_path, (gid,)).results()
    name = 'a_method_with_a_name_' * 12
    results['methods'] = {name: results['methods']['gid_retinanet']}
    tables.print_comparison(results)
    assert name in capsys.readouterr().out
