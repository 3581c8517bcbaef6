//! Python's own notions that templates rely on: what is white space, how numbers and containers print, and the string
//! methods that the engine's compatibility layer lacks or has otherwise.

use std::fmt::Write;

use minijinja::{
    Error, ErrorKind, State, Value,
    value::{Kwargs, ValueKind, from_args},
};

/// How deep a printed container may be.
const MAX_DEPTH: usize = 200;

/// `str.isspace`: Unicode white space and the four ASCII separators.
pub(super) fn is_space(character: char) -> bool {
    character.is_whitespace() || ('\x1c'..='\x1f').contains(&character)
}

/// `repr(float)`: the shortest digits, with an exponent below 1e-4 and from 1e16.
pub(super) fn float_repr(value: f64) -> String {
    if value.is_nan() {
        return "nan".to_owned();
    }
    if value.is_infinite() {
        return (if value > 0.0 { "inf" } else { "-inf" }).to_owned();
    }
    let scientific = format!("{value:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if value != 0.0 && !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{digits}e{sign}{:02}", exponent.abs());
    }
    let plain = value.to_string();
    if plain.contains('.') { plain } else { plain + ".0" }
}

/// `str(value)`, where it differs from the engine's.
pub(super) fn text(state: &State, value: &Value) -> Result<String, Error> {
    match value.kind() {
        ValueKind::Number if !value.is_integer() => Ok(f64::try_from(value.clone()).map_or_else(|_| value.to_string(), float_repr)),
        ValueKind::Seq | ValueKind::Map => {
            let mut out = String::new();
            write_repr(state, value, 0, &mut out)?;
            Ok(out)
        }
        _ => Ok(value.to_string()),
    }
}

fn write_repr(state: &State, value: &Value, depth: usize, out: &mut String) -> Result<(), Error> {
    state.consume_fuel(1)?;
    if depth > MAX_DEPTH {
        return Err(Error::new(ErrorKind::InvalidOperation, "printed value is nested too deeply"));
    }
    let comma = |i: usize, out: &mut String| {
        if i > 0 {
            out.push_str(", ");
        }
    };
    match value.kind() {
        ValueKind::String => string_repr(state, value.as_str().unwrap_or_default(), out)?,
        ValueKind::Seq => {
            let tuple = value.is_tuple();
            out.push(if tuple { '(' } else { '[' });
            let mut count = 0;
            for (i, item) in value.try_iter()?.enumerate() {
                comma(i, out);
                write_repr(state, &item, depth + 1, out)?;
                count = i + 1;
            }
            out.push_str(match (tuple, count) {
                (true, 1) => ",)",
                (true, _) => ")",
                (false, _) => "]",
            });
        }
        ValueKind::Map => {
            out.push('{');
            for (i, key) in value.try_iter()?.enumerate() {
                comma(i, out);
                write_repr(state, &key, depth + 1, out)?;
                out.push_str(": ");
                write_repr(state, &value.get_item(&key)?, depth + 1, out)?;
            }
            out.push('}');
        }
        _ => out.push_str(&text(state, value)?),
    }
    Ok(())
}

fn string_repr(state: &State, text: &str, out: &mut String) -> Result<(), Error> {
    state.consume_fuel(text.len() as u64 / 64)?;
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for character in text.chars() {
        match character {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            character if character == quote => out.extend(['\\', character]),
            character if is_printable(character) => out.push(character),
            character => {
                let code = character as u32;
                _ = match code {
                    0..=0xff => write!(out, "\\x{code:02x}"),
                    0x100..=0xffff => write!(out, "\\u{code:04x}"),
                    _ => write!(out, "\\U{code:08x}"),
                };
            }
        }
    }
    out.push(quote);
    Ok(())
}

/// `str.isprintable` for the characters that occur in text: separators, format and private-use characters are not.
fn is_printable(character: char) -> bool {
    let hidden = matches!(character, '\u{ad}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{e000}'..='\u{f8ff}');
    character == ' ' || !(hidden || character.is_control() || is_space(character))
}

/// Refuses a format whose widths alone would make a huge string: the engine pays for results only once they exist.
pub(super) fn check_format(pattern: &str) -> Result<(), Error> {
    let wide = pattern.split(|c: char| !c.is_ascii_digit()).any(|digits| digits.len() > 4);
    if wide || pattern.contains("%*") || pattern.contains(".*") || pattern.contains(":{") {
        return Err(Error::new(ErrorKind::InvalidOperation, "format: a width or precision that is computed or above 9999"));
    }
    Ok(())
}

/// A method call on a value that the engine does not know: Python's where we have it, else the compatibility layer's.
pub(super) fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    match (value.kind(), value.as_str()) {
        (ValueKind::String, Some(text)) => match string_method(state, text, name, args)? {
            Some(result) => Ok(result),
            None => minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args),
        },
        (ValueKind::Map, _) if name == "copy" => Ok(value.clone()),
        (ValueKind::Seq, _) if name == "copy" => Ok(value.clone()),
        (ValueKind::Seq, _) if name == "index" => {
            let (wanted,): (&Value,) = from_args(args)?;
            let found = value.try_iter()?.position(|item| item == *wanted);
            found.map(Value::from).ok_or_else(|| Error::new(ErrorKind::InvalidOperation, format!("{wanted} is not in list")))
        }
        _ => minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args),
    }
}

fn string_method(state: &State, text: &str, name: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    // The engine charges for results; this pays for the walk over the text.
    state.consume_fuel(text.len() as u64 / 256)?;
    let invalid = |problem: &str| Error::new(ErrorKind::InvalidOperation, format!("str.{name}: {problem}"));
    let strings = |parts: Vec<&str>| Value::from(parts.into_iter().map(Value::from).collect::<Vec<_>>());
    Ok(Some(match name {
        "strip" | "lstrip" | "rstrip" => {
            let (chars,): (Option<&str>,) = from_args(args)?;
            Value::from(strip(text, chars, name != "rstrip", name != "lstrip"))
        }
        "split" | "rsplit" => {
            let (sep, max, kwargs): (Option<Value>, Option<i64>, Kwargs) = from_args(args)?;
            let sep = sep.or(kwargs.get::<Option<Value>>("sep")?).filter(|sep| !sep.is_none());
            let max = max.or(kwargs.get("maxsplit")?).and_then(|max| usize::try_from(max).ok());
            kwargs.assert_all_used()?;
            match &sep {
                None => strings(split_blank(text, max, name == "rsplit")),
                Some(sep) => {
                    let sep = sep.as_str().filter(|sep| !sep.is_empty()).ok_or_else(|| invalid("empty separator"))?;
                    strings(match (max, name) {
                        (None, _) => text.split(sep).collect(),
                        (Some(max), "split") => text.splitn(max + 1, sep).collect(),
                        (Some(max), _) => {
                            let mut parts: Vec<_> = text.rsplitn(max + 1, sep).collect();
                            parts.reverse();
                            parts
                        }
                    })
                }
            }
        }
        "splitlines" => {
            let (keep, kwargs): (Option<bool>, Kwargs) = from_args(args)?;
            let keep = keep.or(kwargs.get("keepends")?).unwrap_or(false);
            strings(split_lines(text, keep))
        }
        "partition" | "rpartition" => {
            let (sep,): (&str,) = from_args(args)?;
            let found = if name == "partition" { text.find(sep) } else { text.rfind(sep) };
            let parts = match found {
                Some(at) => [&text[..at], sep, &text[at + sep.len()..]],
                None if name == "partition" => [text, "", ""],
                None => ["", "", text],
            };
            Value::from(minijinja::value::Tuple::from(parts.map(Value::from)))
        }
        "find" | "rfind" | "index" | "rindex" | "count" => {
            let (what, start, end): (&str, Option<i64>, Option<i64>) = from_args(args)?;
            let (window, offset) = window(text, start, end);
            if name == "count" {
                let count = if what.is_empty() { window.chars().count() + 1 } else { window.matches(what).count() };
                return Ok(Some(Value::from(count)));
            }
            let found = if name.starts_with('r') { window.rfind(what) } else { window.find(what) };
            match found {
                Some(at) => Value::from(offset + window[..at].chars().count()),
                None if name.ends_with("find") => Value::from(-1),
                None => return Err(invalid("substring not found")),
            }
        }
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Value::from(text.strip_prefix(prefix).unwrap_or(text))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Value::from(text.strip_suffix(suffix).unwrap_or(text))
        }
        "zfill" | "ljust" | "rjust" | "center" => {
            let (width, fill): (i64, Option<&str>) = from_args(args)?;
            let missing = usize::try_from(width).unwrap_or(0).saturating_sub(text.chars().count());
            state.consume_fuel(missing as u64 / 16)?;
            let fill = if name == "zfill" { "0" } else { fill.unwrap_or(" ") };
            let (sign, digits) = match text.strip_prefix(['+', '-']) {
                Some(digits) if name == "zfill" => text.split_at(text.len() - digits.len()),
                _ => ("", text),
            };
            // Python puts the odd blank left of the centre when the width is odd.
            let left = match name {
                "ljust" => 0,
                "center" => missing / 2 + (missing & usize::try_from(width).unwrap_or(0) & 1),
                _ => missing,
            };
            Value::from(format!("{sign}{}{digits}{}", fill.repeat(left), fill.repeat(missing - left)))
        }
        "format" => {
            check_format(text)?;
            return Ok(None);
        }
        "swapcase" => {
            let () = from_args(args)?;
            let swap = |c: char| -> String { if c.is_uppercase() { c.to_lowercase().collect() } else { c.to_uppercase().collect() } };
            Value::from(text.chars().map(swap).collect::<String>())
        }
        "casefold" => Value::from(text.to_lowercase().replace('ß', "ss")),
        "isspace" => Value::from(!text.is_empty() && text.chars().all(is_space)),
        "isdecimal" => Value::from(!text.is_empty() && text.chars().all(|c| c.is_ascii_digit())),
        _ => return Ok(None),
    }))
}

/// `str.strip` and its halves.
pub(super) fn strip<'a>(text: &'a str, chars: Option<&str>, left: bool, right: bool) -> &'a str {
    let gone = |character: char| chars.map_or_else(|| is_space(character), |chars| chars.contains(character));
    let text = if left { text.trim_start_matches(gone) } else { text };
    if right { text.trim_end_matches(gone) } else { text }
}

/// `str.split()` without a separator: runs of white space separate, and none is at the ends.
fn split_blank(text: &str, max: Option<usize>, from_right: bool) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = if from_right { text.trim_end_matches(is_space) } else { text.trim_start_matches(is_space) };
    while !rest.is_empty() {
        if max.is_some_and(|max| parts.len() == max) {
            // What is left over keeps its inner blanks; only its outer end is stripped.
            parts.push(rest);
            break;
        }
        if from_right {
            let at = rest.char_indices().rev().find(|(_, c)| is_space(*c)).map_or(0, |(at, c)| at + c.len_utf8());
            parts.push(&rest[at..]);
            rest = rest[..at].trim_end_matches(is_space);
        } else {
            let at = rest.find(is_space).unwrap_or(rest.len());
            parts.push(&rest[..at]);
            rest = rest[at..].trim_start_matches(is_space);
        }
    }
    if from_right {
        parts.reverse();
    }
    parts
}

/// `str.splitlines`: every line boundary that Python knows.
fn split_lines(text: &str, keep: bool) -> Vec<&str> {
    let is_end = |c: char| matches!(c, '\n' | '\r' | '\x0b' | '\x0c' | '\x1c'..='\x1e' | '\u{85}' | '\u{2028}' | '\u{2029}');
    let mut lines = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let at = rest.find(is_end).unwrap_or(rest.len());
        let end = if rest[at..].starts_with("\r\n") { 2 } else { rest[at..].chars().next().map_or(0, char::len_utf8) };
        lines.push(&rest[..if keep { at + end } else { at }]);
        rest = &rest[at + end..];
    }
    lines
}

/// `text[start:end]` in characters, and where it starts.
fn window(text: &str, start: Option<i64>, end: Option<i64>) -> (&str, usize) {
    if start.is_none() && end.is_none() {
        return (text, 0);
    }
    let length = text.chars().count();
    let place = |at: i64| if at < 0 { length.saturating_sub(at.unsigned_abs() as usize) } else { (at as usize).min(length) };
    let (start, end) = (start.map_or(0, place), end.map_or(length, place));
    let byte = |at: usize| text.char_indices().nth(at).map_or(text.len(), |(byte, _)| byte);
    (&text[byte(start)..byte(end.max(start))], start)
}
