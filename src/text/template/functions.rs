//! The functions, filters and tests that templates have in transformers' environment, beyond the engine's own.

use std::sync::Arc;

use jiff::civil::DateTime;
use minijinja::{
    Environment, Error, ErrorKind, State, Value,
    formatting::{FormatStyle, format},
    value::{Kwargs, Object, ObjectRepr, Rest, ValueKind},
};

use super::{json, python, syntax};

/// What `raise_exception` was called with: the template's own words, told apart from errors of the engine.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Refusal(pub String);

/// Puts everything into an environment; `time` is what `strftime_now` tells.
pub(super) fn install(environment: &mut Environment<'static>, time: DateTime) {
    environment.set_unknown_method_callback(python::method);
    environment.set_formatter(|out, state, value| {
        if matches!(value.kind(), ValueKind::Number | ValueKind::Seq | ValueKind::Map) {
            let text = python::text(state, value)?;
            return out.write_str(&text).map_err(Error::from);
        }
        minijinja::escape_formatter(out, state, value)
    });
    environment.add_function("raise_exception", |message: Value| -> Result<Value, Error> {
        let message = message.to_string();
        Err(Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Refusal(message)))
    });
    environment.add_function("strftime_now", move |format: &str| strftime(format, time));
    environment.add_function("cycler", |items: Rest<Value>| -> Result<Value, Error> {
        let items = items.0;
        if items.is_empty() {
            return Err(Error::new(ErrorKind::InvalidOperation, "cycler: at least one item has to be provided"));
        }
        Ok(Value::from_object(Cycler { items, at: Default::default() }))
    });
    environment.add_function("joiner", |separator: Option<&str>| {
        Value::from_object(Joiner { separator: separator.unwrap_or(", ").to_owned(), used: Default::default() })
    });
    environment.add_filter("tojson", json::tojson);
    environment.add_filter("string", |state: &State, value: &Value| python::text(state, value));
    environment.add_filter("trim", |value: &Value, chars: Option<&str>| python::strip(&value.to_string(), chars, true, true).to_owned());
    environment.add_filter("center", |state: &mut State, value: &Value, width: Option<i64>| {
        python::method(state, &Value::from(value.to_string()), "center", &[Value::from(width.unwrap_or(80))])
    });
    environment.add_filter("wordcount", |text: &str| {
        text.split(|c: char| !(c.is_alphanumeric() || c == '_')).filter(|word| !word.is_empty()).count()
    });
    environment.add_filter("urlencode", urlencode);
    environment.add_filter("truncate", truncate);
    environment.add_filter(syntax::PERCENT, |text: &Value, argument: &Value| -> Result<Value, Error> {
        let Some(pattern) = text.as_str() else {
            return Err(Error::new(ErrorKind::InvalidOperation, "%: expected a string to format"));
        };
        python::check_format(pattern)?;
        let arguments: Vec<Value> = if argument.is_tuple() { argument.try_iter()?.collect() } else { vec![argument.clone()] };
        format(FormatStyle::Printf, pattern, &arguments).map(Value::from)
    });
    environment.add_filter("format", |pattern: &str, arguments: Rest<Value>| -> Result<String, Error> {
        python::check_format(pattern)?;
        format(FormatStyle::Printf, pattern, &arguments)
    });
    environment.add_test("sequence", |value: &Value| {
        value.is_undefined() || matches!(value.kind(), ValueKind::Seq | ValueKind::String | ValueKind::Map)
    });
    environment.add_test("iterable", |value: &Value| match value.kind() {
        // The engine would iterate over none as over nothing.
        ValueKind::None | ValueKind::Bool | ValueKind::Number => false,
        _ => value.try_iter().is_ok(),
    });
    environment.add_test("callable", |value: &Value| value.as_object().is_some_and(|object| object.repr() == ObjectRepr::Plain));
}

/// Python's `strftime`; a directive that does not exist prints as it is written, as the C library does.
fn strftime(format: &str, time: DateTime) -> Result<String, Error> {
    if format.len() > 1024 {
        return Err(Error::new(ErrorKind::InvalidOperation, "strftime_now: the format is too long"));
    }
    match jiff::fmt::strtime::format(format, time) {
        Ok(text) => Ok(text),
        Err(error) => Err(Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {error}"))),
    }
}

/// jinja2's `urlencode`: everything but letters, digits and `_.-~/` is escaped; pairs become a query.
fn urlencode(value: &Value) -> Result<String, Error> {
    let quote = |text: &str, query: bool| -> String {
        let mut out = String::with_capacity(text.len());
        for byte in text.bytes() {
            match byte {
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' | b'.' | b'-' | b'~' => out.push(byte as char),
                b'/' if !query => out.push('/'),
                b' ' if query => out.push('+'),
                byte => out.push_str(&format!("%{byte:02X}")),
            }
        }
        out
    };
    match value.kind() {
        ValueKind::Map => {
            let pairs: Result<Vec<_>, Error> = value
                .try_iter()?
                .map(|key| Ok(format!("{}={}", quote(&key.to_string(), true), quote(&value.get_item(&key)?.to_string(), true))))
                .collect();
            Ok(pairs?.join("&"))
        }
        ValueKind::Seq => {
            let pairs: Result<Vec<_>, Error> = value
                .try_iter()?
                .map(|pair| {
                    let (key, item) = (pair.get_item_by_index(0)?, pair.get_item_by_index(1)?);
                    Ok(format!("{}={}", quote(&key.to_string(), true), quote(&item.to_string(), true)))
                })
                .collect();
            Ok(pairs?.join("&"))
        }
        _ => Ok(quote(&value.to_string(), false)),
    }
}

/// jinja2's `truncate(length=255, killwords=false, end='...', leeway=5)`.
fn truncate(text: &str, positional: Rest<Value>, kwargs: Kwargs) -> Result<String, Error> {
    let argument = |at: usize, name: &str| -> Result<Option<Value>, Error> {
        Ok(kwargs.get::<Option<Value>>(name)?.or_else(|| positional.get(at).cloned()).filter(|value| !value.is_none()))
    };
    let size = |value: Option<Value>, default: usize| value.map_or(Ok(default), usize::try_from);
    let length = size(argument(0, "length")?, 255)?;
    let kill_words = argument(1, "killwords")?.is_some_and(|value| value.is_true());
    let end = argument(2, "end")?.map_or_else(|| "...".to_owned(), |value| value.to_string());
    let leeway = size(argument(3, "leeway")?, 5)?;
    kwargs.assert_all_used()?;
    let end_length = end.chars().count();
    if length < end_length {
        return Err(Error::new(ErrorKind::InvalidOperation, format!("truncate: expected length >= {end_length}, got {length}")));
    }
    if text.chars().count() <= length.saturating_add(leeway) {
        return Ok(text.to_owned());
    }
    let mut kept: String = text.chars().take(length - end_length).collect();
    if !kill_words && let Some(at) = kept.rfind(' ') {
        kept.truncate(at);
    }
    Ok(kept + &end)
}

/// jinja2's `cycler`: `next()`, `current`, `reset()`.
#[derive(Debug)]
struct Cycler {
    items: Vec<Value>,
    at: std::sync::atomic::AtomicUsize,
}

impl Object for Cycler {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        let at = self.at.load(std::sync::atomic::Ordering::Relaxed);
        (key.as_str() == Some("current")).then(|| self.items.get(at).cloned()).flatten()
    }

    fn call_method(self: &Arc<Self>, _state: &mut State<'_, '_>, method: &str, _args: &[Value]) -> Result<Value, Error> {
        let order = std::sync::atomic::Ordering::Relaxed;
        match method {
            "next" => {
                let at = self.at.load(order);
                self.at.store((at + 1) % self.items.len(), order);
                Ok(self.items[at].clone())
            }
            "reset" => {
                self.at.store(0, order);
                Ok(Value::from(()))
            }
            _ => Err(Error::from(ErrorKind::UnknownMethod)),
        }
    }
}

/// jinja2's `joiner`: nothing on the first call, the separator from then on.
#[derive(Debug)]
struct Joiner {
    separator: String,
    used: std::sync::atomic::AtomicBool,
}

impl Object for Joiner {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn call(self: &Arc<Self>, _state: &mut State<'_, '_>, _args: &[Value]) -> Result<Value, Error> {
        let used = self.used.swap(true, std::sync::atomic::Ordering::Relaxed);
        Ok(Value::from(if used { self.separator.as_str() } else { "" }))
    }
}
