//! What chat templates may write and the template engine does not read: rewritten before a template is compiled.
//!
//! `{% generation %}…{% endgeneration %}` (transformers' own block, which marks the tokens to train on) becomes a `with`
//! block, which has the same scope; `'…' % x` becomes the filter [`PERCENT`], because the engine's `%` knows only
//! numbers.

/// The filter that stands for Python's `'format' % arguments`.
pub(super) const PERCENT: &str = "_percent";

/// The same template without those two.
pub(super) fn rewrite(source: &str) -> String {
    let mut out = String::with_capacity(source.len() + 64);
    let mut rest = source;
    while let Some((at, close)) = next_tag(rest) {
        let (before, tag) = rest.split_at(at);
        out.push_str(before);
        let inner = &tag[2..];
        let Some(end) = (if close == "#}" { inner.find("#}") } else { closing(inner, close) }) else {
            // Not closed: the compiler will say so.
            out.push_str(tag);
            return out;
        };
        rest = &inner[end + 2..];
        let body = &inner[..end];
        out.push_str(&tag[..2]);
        match (close, body.trim_matches(['-', '+']).trim()) {
            ("#}", _) => out.push_str(body),
            ("%}", "generation") => out.push_str(&body.replacen("generation", "with _generation = 0", 1)),
            ("%}", "endgeneration") => out.push_str(&body.replacen("endgeneration", "endwith", 1)),
            ("%}", "raw") => {
                out.push_str(body);
                // Nothing is a tag until the block ends.
                let end = raw_end(rest).unwrap_or(rest.len());
                out.push_str(close);
                out.push_str(&rest[..end]);
                rest = &rest[end..];
                continue;
            }
            _ => out.push_str(&rewrite_percent(body)),
        }
        out.push_str(close);
    }
    out.push_str(rest);
    out
}

fn next_tag(text: &str) -> Option<(usize, &'static str)> {
    let bytes = text.as_bytes();
    let tag = |pair: &[u8]| match pair {
        b"{{" => Some("}}"),
        b"{%" => Some("%}"),
        b"{#" => Some("#}"),
        _ => None,
    };
    bytes.windows(2).enumerate().find_map(|(at, pair)| Some((at, tag(pair)?)))
}

/// The start of `{% endraw %}`.
fn raw_end(text: &str) -> Option<usize> {
    text.match_indices("{%").map(|(at, _)| at).find(|&at| text[at + 2..].trim_start_matches(['-', '+']).trim_start().starts_with("endraw"))
}

/// Where the tag ends: its closing mark outside of strings and of brackets.
fn closing(inner: &str, close: &str) -> Option<usize> {
    let bytes = inner.as_bytes();
    let (mut at, mut depth) = (0, 0usize);
    while at < bytes.len() {
        match bytes[at] {
            quote @ (b'"' | b'\'') => at = string_end(bytes, at, quote) - 1,
            _ if depth == 0 && inner.as_bytes()[at..].starts_with(close.as_bytes()) => return Some(at),
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        at += 1;
    }
    None
}

/// One past the end of the string that starts here.
fn string_end(bytes: &[u8], start: usize, quote: u8) -> usize {
    let mut at = start + 1;
    while at < bytes.len() {
        match bytes[at] {
            b'\\' => at += 1,
            byte if byte == quote => return at + 1,
            _ => {}
        }
        at += 1;
    }
    bytes.len()
}

/// Rewrites every `%` that follows a string. A filter binds as tightly as the string before it, and its argument is the
/// operand after it.
fn rewrite_percent(expression: &str) -> String {
    let bytes = expression.as_bytes();
    let (mut at, mut after_string) = (0, false);
    while at < bytes.len() {
        match bytes[at] {
            quote @ (b'"' | b'\'') => {
                at = string_end(bytes, at, quote);
                after_string = true;
                continue;
            }
            b'%' if after_string => {
                let end = at + 1 + operand_end(&expression[at + 1..]);
                let (before, operand, after) = (&expression[..at], &expression[at + 1..end], &expression[end..]);
                return format!("{before}|{PERCENT}({}){}", rewrite_percent(operand), rewrite_percent(after));
            }
            byte if byte.is_ascii_whitespace() => {}
            _ => after_string = false,
        }
        at += 1;
    }
    expression.to_owned()
}

/// The length of one operand: a sign, a literal, a name or a group, with its attributes, items, calls and filters.
fn operand_end(text: &str) -> usize {
    let bytes = text.as_bytes();
    let blank = |mut at: usize| {
        while bytes.get(at).is_some_and(u8::is_ascii_whitespace) {
            at += 1;
        }
        at
    };
    let word = |mut at: usize| {
        while bytes.get(at).is_some_and(|byte| byte.is_ascii_alphanumeric() || *byte == b'_' || *byte >= 0x80) {
            at += 1;
        }
        at
    };
    let mut at = blank(0);
    while matches!(bytes.get(at), Some(b'-' | b'+')) {
        at = blank(at + 1);
    }
    at = match bytes.get(at) {
        Some(&quote @ (b'"' | b'\'')) => string_end(bytes, at, quote),
        Some(b'(' | b'[' | b'{') => group_end(text, at),
        _ => word(at),
    };
    loop {
        let next = blank(at);
        at = match bytes.get(next) {
            Some(b'(' | b'[') => group_end(text, next),
            Some(b'.' | b'|') => word(blank(next + 1)),
            _ => return at,
        };
    }
}

/// One past the end of the bracketed group that starts here.
fn group_end(text: &str, start: usize) -> usize {
    let close = match text.as_bytes()[start] {
        b'(' => ")",
        b'[' => "]",
        _ => "}",
    };
    closing(&text[start + 1..], close).map_or(text.len(), |end| start + 1 + end + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_generation_block_becomes_a_scope() {
        assert_eq!(rewrite("a{%- generation -%}b{% endgeneration %}c"), "a{%- with _generation = 0 -%}b{% endwith %}c");
        assert_eq!(rewrite("{{ generation }}"), "{{ generation }}");
    }

    #[test]
    fn percent_after_a_string_becomes_a_filter_and_no_other_does() {
        assert_eq!(rewrite("{{ '%s' % x.y[0]|upper ~ z }}"), "{{ '%s' |_percent( x.y[0]|upper) ~ z }}");
        assert_eq!(rewrite("{{ \"%s %s\" % (a, '%d' % 3) }}"), "{{ \"%s %s\" |_percent( (a, '%d' |_percent( 3))) }}");
        for same in ["{{ a % 2 }}", "{{ f('x') % 2 }}", "{% if loop.index0 % 2 == 0 %}'%'{% endif %}", "{# '%' % x #}", "'a' % b"] {
            assert_eq!(rewrite(same), same);
        }
    }

    #[test]
    fn strings_comments_and_raw_blocks_are_left_alone() {
        for same in ["{{ '{% generation %}' }}", "{% raw %}{% generation %}{% endraw %}", "{{ {'a': {'b': 1}} }}", "{{ '}}' }}", "{% open"]
        {
            assert_eq!(rewrite(same), same);
        }
    }
}
