//! The patterns that PEFT finds modules with: Python regular expressions, most of which are plain names.

use fancy_regex::{Regex, RegexBuilder};

/// Longer than any pattern that anybody wrote, also by program.
const MAX_PATTERN_BYTES: usize = 1 << 16;
/// Steps of a match before it is given up; a name of a module takes a few hundred.
const MAX_STEPS: usize = 100_000;

/// A regular expression in a place of its own, as PEFT builds them.
#[derive(Debug)]
pub enum Pattern {
    /// Letters, digits, `_` and `-`, and dots, of which each matches any character.
    Plain {
        text: String,
        place: Place,
    },
    Expression(Regex),
}

/// Where in a module's name a pattern must match.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// `re.fullmatch(pattern, name)`.
    Whole,
    /// `re.match(rf"(.*\.)?({pattern})$", name)`: whole segments at the end.
    End,
    /// `re.match(rf"(^|.*\.){pattern}($|\..*)", name)`: whole segments anywhere.
    Within,
}

impl Pattern {
    /// The error says why Python's expression cannot be read here.
    pub fn new(text: &str, place: Place) -> Result<Self, String> {
        if text.len() > MAX_PATTERN_BYTES {
            return Err(format!("has {} bytes, expected at most {MAX_PATTERN_BYTES}", text.len()));
        }
        if text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.')) {
            return Ok(Self::Plain { text: text.to_owned(), place });
        }
        let whole = match place {
            Place::Whole => format!(r"\A(?:{text})\z"),
            Place::End => format!(r"\A(.*\.)?({text})\z"),
            Place::Within => format!(r"\A(\A|.*\.){text}(\z|\..*)"),
        };
        Self::expression(&whole)
    }

    /// `re.match(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", name)`: the number that follows these segments.
    pub fn of_layer_number(text: &str) -> Result<Regex, String> {
        match Self::expression(&format!(r"\A(?:\A|.*?\.){text}\.(?P<idx>\d+)\."))? {
            Self::Expression(regex) => Ok(regex),
            Self::Plain { .. } => Err("is no expression".to_owned()),
        }
    }

    fn expression(whole: &str) -> Result<Self, String> {
        let regex = RegexBuilder::new(whole).backtrack_limit(MAX_STEPS).build();
        regex.map(Self::Expression).map_err(|error| format!("is not a regular expression that can be read here: {error}"))
    }

    /// Whether the pattern matches a module's name. An expression that takes too many steps matches nothing, which the caller tells
    /// as a module out of place.
    pub fn matches(&self, name: &str) -> bool {
        match self {
            Self::Expression(regex) => regex.is_match(name).unwrap_or(false),
            Self::Plain { text, place: Place::Whole } => alike(text, name),
            Self::Plain { text, place: Place::End } => {
                let Some(at) = name.len().checked_sub(text.len()).filter(|&at| name.is_char_boundary(at)) else { return false };
                let (before, end) = name.split_at(at);
                (before.is_empty() || before.ends_with('.')) && alike(text, end)
            }
            Self::Plain { text, place: Place::Within } => {
                let begins = std::iter::once(0).chain(name.match_indices('.').map(|(at, _)| at + 1));
                let matches_at = |at: usize| {
                    let found = name.get(at..at + text.len()).is_some_and(|part| alike(text, part));
                    found && name.get(at + text.len()..).is_some_and(|after| after.is_empty() || after.starts_with('.'))
                };
                begins.into_iter().any(matches_at)
            }
        }
    }
}

/// Equal, but for dots of the pattern, which stand for any one character.
fn alike(pattern: &str, text: &str) -> bool {
    pattern.chars().count() == text.chars().count() && pattern.chars().zip(text.chars()).all(|(p, c)| p == c || p == '.' && c != '\n')
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAME: &str = "model.layers.11.self_attn.q_proj";

    fn matches(pattern: &str, place: Place, name: &str) -> bool {
        Pattern::new(pattern, place).unwrap().matches(name)
    }

    #[test]
    fn plain_patterns_match_whole_segments() {
        for (pattern, place, expected) in [
            (NAME, Place::Whole, true),
            ("model.layers.11.self_attn.q_pro", Place::Whole, false),
            ("modelxlayers", Place::Whole, false),
            ("q_proj", Place::Whole, false),
            ("q_proj", Place::End, true),
            ("_proj", Place::End, false),
            ("self_attn.q_proj", Place::End, true),
            ("self_attn.q.proj", Place::End, true),
            (NAME, Place::End, true),
            ("self_attn", Place::End, false),
            ("self_attn", Place::Within, true),
            ("model", Place::Within, true),
            ("q_proj", Place::Within, true),
            ("attn", Place::Within, false),
            ("1", Place::Within, false),
        ] {
            assert_eq!(matches(pattern, place, NAME), expected, "{pattern} {place:?}");
        }
    }

    #[test]
    fn plain_patterns_match_as_the_same_expression_does() {
        for pattern in ["q_proj", "layers.11", "self_attn.q_proj", "model", NAME, "1.self", "odel", "el.layers", "q.proj", ""] {
            for place in [Place::Whole, Place::End, Place::Within] {
                // In brackets it is no plain text any more, and means the same.
                let expression = Pattern::new(&format!("(?:{pattern})"), place).unwrap();
                assert!(matches!(expression, Pattern::Expression(_)));
                for name in [NAME, "model", "q_proj", "a.q_proj", "", "ä.layers.11", "layersx11"] {
                    assert_eq!(matches(pattern, place, name), expression.matches(name), "{pattern:?} {place:?} {name:?}");
                }
            }
        }
    }

    #[test]
    fn expressions_are_pythons() {
        for (pattern, place, expected) in [
            (r"^(?!.*visual).*(?:q_proj|v_proj).*", Place::Whole, true),
            (r"(?:.*?(?:language|text).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:q_proj|k_proj))", Place::Whole, true),
            (r".*layers\.1\..*", Place::Whole, false),
            (r"^model\.layers\.11\.self_attn\.q_proj", Place::End, true),
            (r"layers\.\d+\.self_attn\.(q|k)_proj", Place::End, true),
            (r"(q|k)_proj|gate", Place::End, true),
        ] {
            assert_eq!(matches(pattern, place, NAME), expected, "{pattern}");
        }
        let regex = Pattern::of_layer_number("layers").unwrap();
        let found = regex.captures(NAME).unwrap().unwrap();
        assert_eq!(found.name("idx").unwrap().as_str(), "11");
    }

    #[test]
    fn what_cannot_be_read_says_so_and_what_takes_forever_matches_nothing() {
        assert!(Pattern::new("(", Place::End).unwrap_err().contains("is not a regular expression"));
        assert!(Pattern::new(&"x".repeat(1 << 17), Place::End).unwrap_err().contains("has 131072 bytes"));
        assert!(!matches(r"(?!x)(a+)+$", Place::Whole, &format!("{}b", "a".repeat(60))));
    }
}
