"""Writes snippets.json: small templates and what jinja2 makes of them in the environment that transformers uses.

    python3 snippets.py     (needs Jinja2 3.1.6)
"""
import datetime, json, pathlib
import jinja2, jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment


class Generation(jinja2.ext.Extension):
    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_same"), [], [], body).set_lineno(line)

    def _same(self, caller):
        return caller()


def refuse(message):
    raise jinja2.exceptions.TemplateError(message)


env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
env.filters["tojson"] = lambda x, ensure_ascii=False, indent=None, separators=None, sort_keys=False: json.dumps(
    x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
env.globals["raise_exception"] = refuse
env.globals["strftime_now"] = lambda f: datetime.datetime(2026, 1, 2, 3, 4, 5).strftime(f)
MESSAGES = [{"role": "user", "content": " Hi there \x1f"},
            {"role": "assistant", "content": "b<&>'\"", "n": 1.0, "tool_calls": [{"z": 1, "a": [True, None]}]}]
SNIPPETS = [s for s in r'''
{{ messages[1].tool_calls|tojson }}
{{ messages[1]|tojson(indent=2) }}
{{ messages[1]|tojson(sort_keys=true, ensure_ascii=true) }}
{{ messages[1]|tojson(separators=(',', ':')) }}
{{ {'ü': '€😀', 'x': '\n\t\\"/'}|tojson }} {{ 'ü😀'|tojson(ensure_ascii=True) }} {{ []|tojson(indent=1) }} {{ {}|tojson }}
{{ [1, 2.5, 1e20, 1e-7, true, none, 'a']|tojson }} {{ {1: 2, none: 3, true: 4}|tojson }}
{{ (1, 'x')|tojson }} {{ undefined_thing|tojson }}
{{ messages[1].content|tojson|safe }}
{{ messages[0].content.strip() }}|{{ messages[0].content|trim }}|{{ ' x\x1c'|trim|length }}
{{ 'a,b,,c'.split(',') }} {{ 'a b  c '.split() }} {{ 'a b c'.split(' ', 1) }} {{ ' a b  c '.split(none, 1) }} {{ 'a-b-c'.split('-', maxsplit=1) }}
{{ 'a,b,c'.rsplit(',', 1) }} {{ ' a b c '.rsplit(none, 1) }} {{ 'abc'.rsplit(',') }}
{{ 'a=b=c'.partition('=') }} {{ 'a=b=c'.rpartition('=') }} {{ 'abc'.partition('=') }} {{ 'abc'.rpartition('=') }}
{{ 'abcabc'.index('c') }} {{ 'abcabc'.rindex('c') }} {{ 'äbc'.find('c') }} {{ 'abc'.find('x') }} {{ 'abcabc'.find('c', 3) }} {{ 'aXbX'.count('X') }} {{ 'abc'.count('') }}
{{ 'abc'.index('x') }}
{{ 'prefix-x'.removeprefix('prefix-') }} {{ 'x.py'.removesuffix('.py') }} {{ 'x'.removeprefix('y') }}
{{ '42'.zfill(5) }} {{ '-42'.zfill(5) }} {{ 'x'.ljust(4, '.') }} {{ 'x'.rjust(4) }}| {{ 'ab'.center(5, '*') }} {{ 'abc'.center(6, '*') }}
{{ 'hello World'.title() }} {{ 'hELLO'.capitalize() }} {{ 'Abc'.swapcase() }} {{ 'Straße'.casefold() }} {{ 'ab'.upper() }} {{ 'AB'.lower() }}
{{ 'a\nb\r\nc\x0bd'.splitlines() }} {{ 'a\nb\n'.splitlines(true) }}
{{ 'abc'.startswith('ab') }} {{ 'abc'.endswith(('x', 'c')) }} {{ '12'.isdigit() }} {{ ' \x1c'.isspace() }} {{ 'ab'.isalpha() }}
{{ 'a-b'.replace('-', '+') }} {{ 'aaa'.replace('a', 'b', 2) }} {{ ', '.join(['a', 'b']) }}
{{ '%s and %d' % ('x', 3) }} {{ '%s' % 'y' }} {{ '%.2f' % 3.14159 }} {{ 'a' ~ '%s' % 1 ~ 'b' }} {{ '%05d|%-4s|' % (42, 'x') }}
{{ "{} {}".format('a', 1) }} {{ "%s!"|format('x') }}
{{ 'x' is sequence }} {{ [] is sequence }} {{ {} is sequence }} {{ 1 is sequence }} {{ 'x' is iterable }} {{ {} is mapping }} {{ 'x' is string }}
{{ none is iterable }} {{ 1 is iterable }} {{ [] is iterable }} {{ nothing is iterable }} {{ none is sequence }} {{ range(2) is iterable }}
{{ none is none }} {{ tools is none }} {{ documents is not none }} {{ x is defined }} {{ 1 is number }} {{ true is boolean }} {{ 1.5 is float }} {{ 3 is odd }}
{{ 'one two-three four'|wordcount }} {{ 'a b/c?ü'|urlencode }} {{ {'a': 'x y', 'b': 1}|urlencode }}
{{ 'the quick brown fox jumps'|truncate(12) }} {{ 'the quick brown fox jumps'|truncate(12, true) }} {{ 'short'|truncate(3, leeway=0) }} {{ 'the quick brown'|truncate(9, false, '…', 0) }}
{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{{ c.next() }}{{ c.current }}
{% set j = joiner('; ') %}{% for x in [1, 2, 3] %}{{ j() }}{{ x }}{% endfor %}
{{ dict(a=1, b=2) }} {{ dict({'x': 1}, y=2)|tojson }}
{% set ns = namespace(n=0, seen=[]) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% set ns.seen = ns.seen + [m.role] %}{% endfor %}{{ ns.n }} {{ ns.seen }}
{% for m in messages %}{{ loop.index }}{{ loop.index0 }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.revindex }}{{ loop.cycle('x', 'y') }}{% if not loop.last %},{% endif %}{% endfor %}
{% for i in range(10) %}{% if i == 2 %}{% continue %}{% endif %}{% if i == 5 %}{% break %}{% endif %}{{ i }}{% endfor %}
{% for i in [] %}x{% else %}empty{% endfor %} {% for i in [1, 2, 3] if i is odd %}{{ i }}{% endfor %}
{% for k, v in {'a': 1, 'b': 2}.items() %}{{ k }}={{ v }};{% endfor %} {{ {'b': 1, 'a': 2}|dictsort }} {{ {'a': 1}|items|list }}
{% generation %}{{ messages[1].content }}{% endgeneration %}|
{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}
{% macro m(a, b='d') %}[{{ a }}-{{ b }}]{% endmacro %}{{ m(1) }}{{ m(1, b=2) }}
{% macro w() %}<{{ caller() }}>{% endmacro %}{% call w() %}in{% endcall %}
{% set t %}captured {{ 1 + 1 }}{% endset %}{{ t|upper }}
{% filter upper %}abc{% endfilter %} {% with a = 1, b = 2 %}{{ a + b }}{% endwith %}
{{ messages[::-1][0].role }} {{ messages[-1].role }} {{ [1, 2, 3][1:] }} {{ 'abcdef'[1:4] }} {{ 'abc'[::-1] }} {{ 'abc'[-1] }}
{{ messages|map(attribute='role')|join(',') }} {{ messages|selectattr('role', 'equalto', 'user')|list|length }} {{ messages|rejectattr('n', 'defined')|map(attribute='role')|list }}
{{ [3, 1, 2]|sort }} {{ [3, 1, 2]|sort(reverse=true) }} {{ [1, 1, 2]|unique|list }} {{ [1, 2]|first }} {{ [1, 2]|last }} {{ [1, 2]|sum }} {{ [1, 5]|max }} {{ 'abc'|reverse }} {{ 'ab'|list }}
{{ 'x' if false else 'y' }} {{ 'x' if false }}| {{ x|default('d') }} {{ ''|default('d', true) }} {{ none|default('d') }}
{{ 1.0 }} {{ 1e16 }} {{ 1.5e-7 }} {{ 7 / 2 }} {{ 7 // 2 }} {{ -7 // 2 }} {{ 7 % 3 }} {{ 2 ** 10 }} {{ 100000.0 * 10 }} {{ 1/3 }}
{{ true }} {{ none }} {{ [true, none, 'a', "it's", 1.0] }} {{ {'a': [1, {'b': (1,)}]} }} {{ ('a', 'b') }} {{ 'a\nb'|list }} {{ ['a\tb', 'é', '\x00'] }}
{{ 'a' in 'abc' }} {{ 'a' in ['b'] }} {{ 'role' in messages[0] }} {{ 'x' not in {'y': 1} }} {{ 1 < 2 < 3 }} {{ 'a' == 'a' and not false }}
{{ messages[0]['role'] }} {{ messages[0].get('x', 'none') }} {{ messages[0].get('x') }} {{ messages[1].keys()|list }} {{ messages[5] }}| {{ messages[0].nothing }}|
{{ messages[0].nothing.deeper }}
{{ raise_exception('refused') }}
{{ strftime_now('%d %b %Y') }} {{ strftime_now('%Y-%m-%d %H:%M:%S %A %B %j') }}
{{ bos_token }}{{ eos_token }} {{ add_generation_prompt }} {{ pad_token is defined }}
{{ 'abc'|upper|lower|capitalize }} {{ 'a b'|title }} {{ 3.7|int }} {{ '5'|int + 1 }} {{ 3.14159|round(2) }} {{ -3|abs }} {{ '1.5'|float }} {{ 5|string + 'x' }} {{ 1.0|string }}
{{ 'a\nb'|indent(2) }} {{ 'a\nb'|indent(2, true) }} {{ ['a', 'b']|join(' | ') }} {{ 'aXb'|replace('X', '-') }} {{ 'x'|length }} {{ [1,2,3,4,5]|batch(2)|list }} {{ {'a': 1}|length }}
{{ ['a', 'b'] + ['c'] }} {{ 'ab' * 2 }} {{ 'a' ~ 1 ~ none ~ true }} {{ [0] * 3 }}
{{ 'a' 'b' }} {{ "x\u00e9" }} {{ 'tab\there' }} {{ '{% x %}' }} {{ '}}' }}
{% raw %}{{ not a tag }}{% endraw %}{# a comment #}|
{% if messages[0].role == 'user' and messages|length > 1 %}yes{% elif x %}no{% else %}else{% endif %}
{%- if true -%}   trimmed   {%- endif -%}
{{ messages[1].tool_calls[0].a[0] }} {{ messages[1].tool_calls is iterable and messages[1].tool_calls is not string and messages[1].tool_calls is not mapping }}
{{ range(3)|list }} {{ range(1, 7, 2)|list }} {{ (1, 2) + (3,) }} {{ [1, [2, 3]][1][0] }}
{% set a, b = 1, 2 %}{{ a }}{{ b }} {% set d = {'k': 'v'} %}{{ d.k }} {{ d['k'] }}
{{ messages.append(1) }}
{{ [{'a': 2}, {'a': 1}]|sort(attribute='a') }} {{ [{'t': 'x', 'v': 1}, {'t': 'x', 'v': 2}]|groupby('t')|length }}
{{ 'x'|unknown_filter }}
{{ unknown_function() }}
'''.strip("\n").split("\n")]
SNIPPETS += ["  {% if true %}\nline\n  {% endif %}\nend\n", "{% for m in messages %}\n{{ m.role }}\n{% endfor %}\n", "a\n\n", "{{ 'x' }}\n\n{{ 'y' }}\n",
             "{#- c -#}  a  {#- d -#}\n b", "   {{- ' x ' -}}   y", "{%- for x in [1,2] %}\n  {{- x }}\n{%- endfor %}\n"]
out = []
for text in SNIPPETS:
    try:
        rendered = env.from_string(text).render(messages=MESSAGES, tools=None, documents=None, add_generation_prompt=False, bos_token="<s>", eos_token="</s>")
    except Exception:
        rendered = None
    out.append({"template": text, "rendered": rendered})
pathlib.Path(__file__).with_name("snippets.json").write_text(json.dumps(out, ensure_ascii=True, indent=1) + "\n")
