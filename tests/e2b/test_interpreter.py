"""E2B's Python package of the code interpreter, unmodified, against a bhatti daemon."""

import json
import os
import re
import threading
import time
import urllib.error
import urllib.request

import pytest
from e2b import InvalidArgumentException, NotFoundException, SandboxException, Template, TimeoutException
from e2b_code_interpreter import Sandbox
from e2b_code_interpreter.charts import BarChart, BoxAndWhiskerChart, LineChart, PieChart, ScatterChart, SuperChart

from test_sdk import BASE, until

FIGURE = "import matplotlib.pyplot as plt\n"


@pytest.fixture(scope="module")
def sandbox():
    made = Sandbox.create(timeout=600, envs={"GIVEN": "yes"})
    yield made
    made.kill()


def chart(sandbox, code):
    """Draws, and returns the chart of the only result."""
    (result,) = sandbox.run_code(FIGURE + code + ";").results
    assert result.png and result.text.startswith("<Figure") and not result.extra
    return result.chart


def status(sandbox, path, body):
    """Sends a request to the server of the kernels. Returns status and body."""
    headers = {
        "E2b-Sandbox-Id": sandbox.sandbox_id,
        "E2b-Sandbox-Port": "49999",
        "X-Access-Token": sandbox._envd_access_token,
    }
    request = urllib.request.Request(BASE + path, body, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_code_runs_in_one_state(sandbox):
    first = sandbox.run_code("x = 1; x")
    assert (first.text, first.results[0].is_main_result, first.error) == ("1", True, None)
    second = sandbox.run_code("""
        x += 1
        print(x)
        'done'
    """)
    assert (second.text, second.logs.stdout) == ("done", ["2\n"])
    assert second.execution_count == first.execution_count + 1
    assert "".join(sandbox.run_code("!pwd; whoami").logs.stdout) == "/home/user\r\nroot\r\n"
    assert sandbox.run_code("").text is None


def test_output_is_streamed_in_order(sandbox):
    out, err, results, errors = [], [], [], []
    code = "import sys, time\nfor n in range(3):\n    print(n, flush=True); time.sleep(0.3)\nprint('bad', file=sys.stderr)\ndisplay(1)\n2"
    ran = sandbox.run_code(code, on_stdout=out.append, on_stderr=err.append, on_result=results.append, on_error=errors.append)
    assert "".join(piece.line for piece in out) == "0\n1\n2\n" and len(out) >= 2
    assert [piece.line for piece in err] == ["bad\n"] and err[0].error
    assert [(result.text, result.is_main_result) for result in results] == [("1", False), ("2", True)]
    assert errors == [] and ran.text == "2"
    much = sandbox.run_code("for n in range(200_000): print(n)")
    assert "".join(much.logs.stdout) == "".join(f"{n}\n" for n in range(200_000))


def test_errors_have_name_value_and_traceback(sandbox):
    error = sandbox.run_code("def f(): return 1 / 0\nf()").error
    assert (error.name, error.value) == ("ZeroDivisionError", "division by zero")
    plain = re.sub(r"\x1b\[[0-9;]*m", "", error.traceback)
    assert "return 1 / 0" in plain and "----> 2 f()" in plain
    assert sandbox.run_code("this is no code").error.name == "SyntaxError"
    assert sandbox.run_code("input()").error.name == "StdinNotImplementedError"
    dead = sandbox.run_code("import os; os._exit(3)").error
    assert dead.name == "KernelDied" and "state is gone" in dead.value
    assert sandbox.run_code("1 + 1").text == "2"


def test_results_have_the_formats_of_their_values(sandbox):
    def formats(code):
        (result,) = sandbox.run_code(code).results
        return result

    frame = formats("import pandas as pd\npd.DataFrame({'n': [1, 2.5, None], 't': pd.to_datetime(['2020-01-02', None, None])})")
    assert frame.data == {"n": [1, 2.5, None], "t": ["2020-01-02T00:00:00", None, None]}
    assert "<table" in frame.html and "2020-01-02" in frame.text
    assert formats("{'a': [1, (2, 3)]}").json == {"a": [1, [2, 3]]}
    assert formats("[object()]").json is None
    assert formats(r"from IPython.display import *; display({'text/latex': r'\x'}, raw=True)").formats() == ["latex"]
    assert formats("Markdown('*a*')").markdown == "*a*"
    assert formats("SVG('<svg></svg>')").svg == "<svg/>"
    assert formats("Javascript('x()')").javascript == "x()"
    assert formats("display({'a/b': 'c'}, raw=True)").extra == {"a/b": "c"}
    image = "from PIL import Image; image = Image.new('RGB', (4, 4))\n"
    for use in ("image", "image.show()", "image.save('/tmp/image.png')"):
        assert formats(image + use).png, use


def test_charts_have_their_data(sandbox):
    bar = chart(sandbox, "plt.bar(['a', 'b'], [1, 2], label='all'); plt.title('T'); plt.xlabel('Name'); plt.ylabel('Size (kg)'); plt.show()")
    assert isinstance(bar, BarChart) and (bar.title, bar.x_label, bar.y_unit) == ("T", "Name", "kg")
    assert [(it.label, it.value, it.group) for it in bar.elements] == [("a", 1, "all"), ("b", 2, "all")]
    line = chart(sandbox, "import datetime\nplt.plot([datetime.date(2023, 9, n) for n in (1, 2)], [3, 4], label='l'); plt.yscale('log')")
    assert isinstance(line, LineChart) and (line.x_scale, line.y_scale, line.title) == ("datetime", "log", None)
    assert line.elements[0].points == [("2023-09-01T00:00:00+00:00", 3), ("2023-09-02T00:00:00+00:00", 4)]
    assert all(isinstance(tick, str) for tick in line.x_ticks) and all(isinstance(tick, float) for tick in line.y_ticks)
    pie = chart(sandbox, "plt.pie([90, 10], labels=['no', 'yes'], autopct='%1.1f%%')")
    assert isinstance(pie, PieChart) and [(it.label, it.angle) for it in pie.elements] == [("no", 324), ("yes", 36)]
    for style in ("patch_artist=True", "patch_artist=False", "vert=False"):
        box = chart(sandbox, f"plt.boxplot([[78, 85, 88, 90, 92], [95, 89, 76, 91, 84, 87]], labels=['A', 'B'], {style})")
        assert isinstance(box, BoxAndWhiskerChart)
        first, second = box.elements
        assert (first.label, first.min, first.first_quartile, first.median, first.third_quartile, first.max) == ("A", 78, 85, 88, 90, 92), style
        assert (first.outliers, second.outliers, second.min) == ([], [76], 84), style
    both = chart(sandbox, "figure, (one, two) = plt.subplots(1, 2); figure.suptitle('S'); one.plot([1], [2]); two.scatter([1, 2], [3, 4]); two.grid(True)")
    assert isinstance(both, SuperChart) and both.title == "S"
    assert isinstance(both.elements[0], LineChart) and isinstance(both.elements[1], ScatterChart)
    other = chart(sandbox, "plt.imshow([[1, 2], [3, 4]])")
    assert other.type == "unknown" and other.elements == []


def test_contexts_have_their_own_state(sandbox):
    assert [it.language for it in sandbox.list_code_contexts()][:2] == ["python", "javascript"]
    context = sandbox.create_code_context(cwd="/tmp")
    listed = sandbox.list_code_contexts()[-1]
    assert (listed.id, listed.language, listed.cwd) == (context.id, "python", "/tmp")
    sandbox.run_code("mine = 1")
    assert sandbox.run_code("import os; os.getcwd()", context=context).text == "/tmp"
    assert sandbox.run_code("mine", context=context).error.name == "NameError"
    sandbox.run_code("theirs = 1", context=context)
    sandbox.restart_code_context(context)
    assert sandbox.run_code("theirs", context=context).error.value == "name 'theirs' is not defined"
    sandbox.remove_code_context(context)
    assert context.id not in [it.id for it in sandbox.list_code_contexts()]
    for refused in (
        lambda: sandbox.run_code("1", context=context),
        lambda: sandbox.remove_code_context(context),
        lambda: sandbox.restart_code_context(context),
    ):
        with pytest.raises(NotFoundException, match="not found"):
            refused()
    with pytest.raises(SandboxException, match="choose one of python, javascript"):
        sandbox.create_code_context(language="cobol")
    with pytest.raises(SandboxException, match="'/none' is not a directory"):
        sandbox.create_code_context(cwd="/none")
    with pytest.raises(InvalidArgumentException):
        sandbox.run_code("1", language="js", context=context)


@pytest.mark.parametrize(("language", "code"), [("python", "import time; time.sleep(300)"), ("bash", "sleep 300")])
def test_restart_ends_what_runs(sandbox, language, code):
    context = sandbox.create_code_context(language=language)
    begun = threading.Timer(1, sandbox.restart_code_context, [context])
    begun.start()
    assert sandbox.run_code(code, context=context).error.name == "ContextRestarted"
    begun.join()
    assert sandbox.run_code("1" if language == "python" else "echo 1", context=context).error is None
    sandbox.remove_code_context(context)


def test_bad_requests_are_refused(sandbox):
    for body, message in [
        (b"{", "not JSON"),
        (b"[]", "not a JSON object"),
        (b"{}", "`code`"),
        (b'{"code": 1}', "`code`"),
        (rb'{"code": "\ud800"}', "`code`"),
        (rb'{"code": "", "env_vars": {"A": "\u0000"}}', "`env_vars`"),
        (b'{"code": "", "env_vars": {"A": 1}}', "`env_vars`"),
        (b'{"code": "", "context_id": "x", "language": "js"}', "not both"),
        (b'{"code": "", "language": "cobol"}', "cobol"),
        (b'{"code": "", "language": 1}', "`language`"),
        (b'{"code": "", "context_id": ["x"]}', "`context_id`"),
    ]:
        code, said = status(sandbox, "/execute", body)
        assert code == 400 and message in said, (body, said)
    for body in (b'{"language": {}}', b'{"cwd": 1}', b'{"cwd": "/tmp\\u0000"}'):
        assert status(sandbox, "/contexts", body)[0] == 400, body
    assert status(sandbox, "/none", b"{}")[0] == 404


def test_javascript_and_typescript_run(sandbox):
    def js(code, language="js"):
        return sandbox.run_code(code, language=language)

    assert js("let x = 1; console.log('out'); console.error('err'); x + 1").text == "2"
    said = js("console.log('out'); console.error('err')").logs
    assert (said.stdout, said.stderr) == (["out\n"], ["err\n"])
    assert js("await Promise.resolve('x' + x)").text == "x1"
    assert js("import { sep } from 'path'\nimport * as os from 'os'\nsep + typeof os.cpus").text == "/function"
    assert js("process.cwd()").text == "/home/user"
    error = js("function f() { throw new RangeError('no') }\nf()").error
    assert (error.name, error.value) == ("RangeError", "no") and "at f" in error.traceback
    assert js("{").error.name == "SyntaxError"
    assert "status 3" in js("process.exit(3)").error.value
    assert js("typeof x").text == "undefined"
    typed = "enum Size { S, M }\ninterface I { a: number }\nconst it: I = { a: Size.M }\nit.a"
    assert js(typed, "ts").text == "1"
    assert js("it.a + 1", "typescript").text == "2"


def test_bash_keeps_its_state(sandbox):
    def bash(code, **options):
        return sandbox.run_code(code, language="bash", **options)

    assert bash("cd /tmp; f() { echo f$1; }; x=5; pwd").logs.stdout == ["/tmp\n"]
    ran = bash("f $x; pwd; echo err >&2; cat; (exit 4)")
    assert "".join(ran.logs.stdout) == "f5\n/tmp\n" and ran.logs.stderr == ["err\n"]
    assert (ran.error.name, ran.error.value) == ("ExitStatus", "4")
    assert bash("sleep 1000 & echo $((1 + 1))").logs.stdout == ["2\n"]
    with pytest.raises(TimeoutException):
        bash("sleep 1000", timeout=2)
    assert bash("echo $x").logs.stdout == ["5\n"]
    # Code that goes on after an interrupt is killed.
    with pytest.raises(TimeoutException):
        bash("trap '' INT; while :; do sleep 1; done", timeout=2)
    assert bash("echo [$x]").logs.stdout == ["[]\n"]
    assert "status 3" in bash("exit 3").error.value
    assert bash("echo [$x]").logs.stdout == ["[]\n"]


@pytest.mark.parametrize(
    ("language", "given", "set"),
    [
        ("python", "import os; print(os.environ.get('GIVEN'))", "import os; print(os.environ.get('SET'))"),
        ("javascript", "console.log(process.env.GIVEN)", "console.log(process.env.SET ?? 'None')"),
        ("bash", "echo $GIVEN", "echo ${SET:-None}"),
    ],
)
def test_variables_hold_for_one_execution(sandbox, language, given, set):
    def said(code, **variables):
        return "".join(sandbox.run_code(code, language=language, envs=variables).logs.stdout)

    odd = "it's \"$x\" \\ ü"
    assert said(given) == "yes\n"
    assert said(given, GIVEN="other") == "other\n" and said(given) == "yes\n"
    assert said(set, SET=odd) == odd + "\n" and said(set) == "None\n"


@pytest.mark.parametrize(("language", "code"), [("python", "while True: pass"), ("js", "for (;;) {}"), ("js", "await new Promise(() => {})")])
def test_client_that_leaves_interrupts_its_code(sandbox, language, code):
    with pytest.raises(TimeoutException):
        sandbox.run_code(code, language=language, timeout=2)
    assert sandbox.run_code("1 + 1", language=language, timeout=30).text == "2"


def test_sandboxes_begin_with_different_random_numbers(sandbox):
    code = "import random, numpy; print(random.random(), numpy.random.rand())"
    other = Sandbox.create(timeout=60)
    try:
        first = other.run_code(code).logs.stdout
        assert first != sandbox.run_code(code, context=sandbox.create_code_context()).logs.stdout
        third = Sandbox.create(timeout=60)
        assert third.run_code(code).logs.stdout != first
        third.kill()
        # The template has no variables of another sandbox.
        assert other.run_code("import os; os.environ.get('GIVEN', 'none')").text == "none"
    finally:
        other.kill()


def test_state_outlives_a_pause():
    sandbox = Sandbox.create(timeout=60, network={"allow_public_traffic": False})
    sandbox.run_code("kept = 41")
    sandbox.pause()
    again = Sandbox.connect(sandbox.sandbox_id, timeout=60)
    assert again.run_code("kept + 1").text == "42"
    again.kill()


def test_killed_sandbox_is_a_timeout():
    sandbox = Sandbox.create(timeout=60)
    killing = threading.Timer(1, sandbox.kill)
    killing.start()
    with pytest.raises(TimeoutException, match="was killed"):
        sandbox.run_code("import time; time.sleep(300)")
    killing.join()


def test_killed_server_starts_again(sandbox):
    sandbox.commands.run("pkill -9 -f -- '-m [b]hatti_interpreter$'", user="root")

    def is_healthy():
        return status(sandbox, "/health", None)[0] == 200

    until(is_healthy)
    assert sandbox.run_code("1 + 1").text == "2"


def test_template_can_begin_with_the_interpreter():
    template = Template().from_template("code-interpreter-v1").run_cmd("echo more >more")
    Template.build(template, "own-interpreter")
    sandbox = Sandbox.create("own-interpreter", timeout=60)
    assert sandbox.run_code("open('more').read()").text == r"more\n"
    sandbox.kill()
    assert Template.exists("code-interpreter-v1")


def test_public_template_is_not_its_users():
    request = urllib.request.Request(f"{BASE}/templates/code-interpreter-v1", method="DELETE", headers={"X-API-KEY": os.environ["E2B_API_KEY"]})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=60)
    assert refused.value.code == 403 and "admin" in json.loads(refused.value.read())["message"]
    began = time.monotonic()
    sandbox = Sandbox.create(timeout=60)
    assert sandbox.run_code("1").text == "1"
    print(f"create and run_code: {time.monotonic() - began:.2f} s")
    sandbox.kill()
