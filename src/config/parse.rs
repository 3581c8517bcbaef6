//! Texts to values: what was expected is said when it does not work.

use std::net::SocketAddr;
use std::time::Duration;

use crate::checkpoint::{Dtype, HeadChoice};

pub(super) fn address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| "expected an address such as 127.0.0.1:50051".to_owned())
}

pub(super) fn text(text: &str) -> Result<String, String> {
    Ok(text.to_owned())
}

pub(super) fn optional_text(text: &str) -> Result<Option<String>, String> {
    Ok((!text.is_empty()).then(|| text.to_owned()))
}

/// A whole number of at least 1.
pub(super) fn count(text: &str) -> Result<usize, String> {
    let digits = text.replace('_', "");
    digits.parse().ok().filter(|&count| count > 0).ok_or_else(|| "expected a whole number of at least 1".to_owned())
}

pub(super) fn auto_count(text: &str) -> Result<Option<usize>, String> {
    if text == "auto" { Ok(None) } else { count(text).map(Some).map_err(|problem| format!("{problem}, or auto")) }
}

pub(super) fn number_from_zero(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| "expected a whole number".to_owned())
}

/// A step of the scheduler's scale.
pub(super) fn nice(text: &str) -> Result<u8, String> {
    text.parse().ok().filter(|&nice| nice <= 19).ok_or_else(|| "expected a whole number from 0 to 19".to_owned())
}

pub(super) fn optional_float(text: &str) -> Result<Option<f64>, String> {
    if text.is_empty() {
        return Ok(None);
    }
    let value: Option<f64> = text.parse().ok();
    value.filter(|value| value.is_finite()).map(Some).ok_or_else(|| "expected a finite number".to_owned())
}

/// A number from 0 to 1.
pub(super) fn share(text: &str) -> Result<f64, String> {
    let value: Option<f64> = text.parse().ok();
    value.filter(|value| (0.0..=1.0).contains(value)).ok_or_else(|| "expected a number from 0 to 1".to_owned())
}

/// `on` or `off`; YAML's booleans mean the same.
pub(super) fn switch(text: &str) -> Result<bool, String> {
    match text {
        "on" | "true" => Ok(true),
        "off" | "false" => Ok(false),
        _ => Err("expected on or off".to_owned()),
    }
}

/// An address of a server that speaks HTTP/2 without TLS.
pub(super) fn optional_url(text: &str) -> Result<Option<String>, String> {
    match text.strip_prefix("http://") {
        _ if text.is_empty() => Ok(None),
        Some(host) if !host.is_empty() && !host.contains(char::is_whitespace) => Ok(Some(text.to_owned())),
        _ => Err("expected an address such as http://127.0.0.1:4317".to_owned()),
    }
}

/// Names of tenants, by commas.
pub(super) fn tenants(text: &str) -> Result<Vec<String>, String> {
    let most = crate::serve::tenants::MAX_TENANTS;
    let names: Vec<String> = text.split(',').map(|name| name.trim().to_owned()).filter(|name| !name.is_empty()).collect();
    match names.iter().find(|name| !crate::serve::tenants::is_name(name)) {
        Some(name) => {
            Err(format!("expected names of printable ASCII without blanks, of at most 64 bytes, not none or other; `{name}` is none"))
        }
        None if names.len() > most => Err(format!("expected at most {most} names")),
        None => Ok(names),
    }
}

/// A number within these bounds.
pub(super) fn within(least: f64, most: f64) -> impl Fn(&str) -> Result<f64, String> {
    move |text| {
        let value: Option<f64> = text.parse().ok();
        value.filter(|value| (least..=most).contains(value)).ok_or_else(|| match most {
            f64::MAX => format!("expected a finite number of at least {least}"),
            _ => format!("expected a number from {least} to {most}"),
        })
    }
}

/// `512`, `64KiB`, `64 MiB`, `1GiB`; also `kB`, `MB`, `GB` in powers of ten.
pub fn size(text: &str) -> Result<usize, String> {
    let expected = || "expected a size such as 64MiB, of at least 1 byte".to_owned();
    let (digits, unit) = split_unit(text);
    let factor: usize = match unit {
        "" | "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        "kB" => 1_000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        _ => return Err(expected()),
    };
    let count: usize = digits.parse().map_err(|_| expected())?;
    count.checked_mul(factor).filter(|&bytes| bytes > 0).ok_or_else(expected)
}

/// A size; `off` is none.
/// The same, or `off` for 0.
pub fn size_or_off(text: &str) -> Result<usize, String> {
    if text == "off" { Ok(0) } else { size(text).map_err(|problem| format!("{problem}, or off")) }
}

/// `250ms`, `5s`, `2m`, `1h`.
pub fn duration(text: &str) -> Result<Duration, String> {
    let expected = || "expected a time such as 500ms, 5s or 2m, of at most a day".to_owned();
    let (digits, unit) = split_unit(text);
    let count: u64 = digits.parse().map_err(|_| expected())?;
    let milliseconds = match unit {
        "ms" => Some(count),
        "s" => count.checked_mul(1_000),
        "m" => count.checked_mul(60_000),
        "h" => count.checked_mul(3_600_000),
        _ => None,
    };
    milliseconds.filter(|&ms| ms <= 86_400_000).map(Duration::from_millis).ok_or_else(expected)
}

/// `YYYY-MM-DD`.
pub(super) fn optional_date(text: &str) -> Result<Option<jiff::civil::Date>, String> {
    if text.is_empty() {
        return Ok(None);
    }
    text.parse().map(Some).map_err(|_| "expected a date such as 2026-01-31".to_owned())
}

/// One of a few words.
pub(super) fn choice<T: Copy>(choices: &'static [(&'static str, T)]) -> impl Fn(&str) -> Result<T, String> {
    move |text| {
        let found = choices.iter().find(|(name, _)| *name == text);
        found.map(|&(_, value)| value).ok_or_else(|| {
            let names: Vec<_> = choices.iter().map(|(name, _)| *name).collect();
            format!("expected {}", names.join(" or "))
        })
    }
}

/// What a model may run in.
pub(super) fn dtype(text: &str) -> Result<Option<Dtype>, String> {
    choice(&[("", None), ("float32", Some(Dtype::F32)), ("bfloat16", Some(Dtype::Bf16)), ("float16", Some(Dtype::F16))])(text)
}

/// The `head:` of a recipe, or the name of one alone.
pub(super) fn head(text: &str) -> Result<Option<HeadChoice>, String> {
    let Some(value) = yaml(text)? else { return Ok(None) };
    let value = if value.is_string() { serde_json::json!({"name": value}) } else { value };
    HeadChoice::parse(Some(&value), None).map(Some).map_err(|problems| problems.join("; "))
}

/// The `pooling:` of a recipe.
pub(super) fn pooling(text: &str) -> Result<Option<HeadChoice>, String> {
    let Some(value) = yaml(text)? else { return Ok(None) };
    HeadChoice::parse(None, Some(&value)).map(Some).map_err(|problems| problems.join("; "))
}

fn yaml(text: &str) -> Result<Option<serde_json::Value>, String> {
    let value: serde_json::Value = serde_norway::from_str(text).map_err(|error| format!("expected YAML: {error}"))?;
    Ok(Some(value).filter(|value| !value.is_null()))
}

fn split_unit(text: &str) -> (&str, &str) {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    (&text[..end], text[end..].trim_start())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_have_units_and_do_not_overflow() {
        assert_eq!(size("64MiB"), Ok(64 << 20));
        assert_eq!(size("3 kB"), Ok(3_000));
        assert_eq!(size("17"), Ok(17));
        assert_eq!((size_or_off("off"), size_or_off("1kB")), (Ok(0), Ok(1_000)));
        for bad in ["", "MiB", "-1", "0", "1TB", "99999999999999999999GiB", "18446744073709551615KiB"] {
            assert!(size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn nice_ends_at_nineteen() {
        assert_eq!([nice("0"), nice("19")], [Ok(0), Ok(19)]);
        assert!(nice("20").is_err() && nice("-1").is_err());
    }

    #[test]
    fn times_need_a_unit_and_end_at_a_day() {
        assert_eq!(duration("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(duration("2m"), Ok(Duration::from_secs(120)));
        assert_eq!(duration("0s"), Ok(Duration::ZERO));
        for bad in ["", "5", "s", "25h", "18446744073709551615h", "1.5s"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_a_parser_panic(input in ".{0,30}") {
            let _ = (address(&input), count(&input), auto_count(&input), optional_float(&input));
            let _ = (size(&input), duration(&input), optional_date(&input), head(&input), pooling(&input));
        }
    }
}
