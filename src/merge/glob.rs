//! Patterns over tensor names, for the rules of a recipe.

use std::fmt;

/// A pattern that must match a whole name: `*` stands for any characters (also none, also dots), `?` for exactly one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Glob(String);

impl Glob {
    /// Characters that other dialects read as more than themselves are refused: no tensor has them in its name.
    pub fn try_new(pattern: &str) -> Result<Self, String> {
        if pattern.is_empty() {
            return Err("expected a pattern, found empty text".to_owned());
        }
        match pattern.chars().find(|c| "[]{}!\\".contains(*c)) {
            Some(c) => Err(format!("{pattern:?}: {c:?} has no meaning here, expected a tensor name in which `*` and `?` are wildcards")),
            None => Ok(Self(pattern.to_owned())),
        }
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Takes time in the product of both lengths at most: only the last `*` is ever tried again.
    pub fn matches(&self, name: &str) -> bool {
        let (pattern, name): (Vec<char>, Vec<char>) = (self.0.chars().collect(), name.chars().collect());
        let (mut at, mut in_name) = (0, 0);
        let mut star: Option<(usize, usize)> = None;
        while let Some(&found) = name.get(in_name) {
            match pattern.get(at) {
                Some('*') => {
                    star = Some((at, in_name));
                    at += 1;
                }
                Some(&wanted) if wanted == '?' || wanted == found => {
                    at += 1;
                    in_name += 1;
                }
                _ => match &mut star {
                    None => return false,
                    Some((star_at, taken)) => {
                        *taken += 1;
                        (at, in_name) = (*star_at + 1, *taken);
                    }
                },
            }
        }
        pattern.iter().skip(at).all(|&left| left == '*')
    }
}

impl fmt::Display for Glob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn matches(pattern: &str, name: &str) -> bool {
        Glob::try_new(pattern).unwrap().matches(name)
    }

    #[test]
    fn a_pattern_matches_whole_names() {
        for (pattern, name, expected) in [
            ("score.weight", "score.weight", true),
            ("score.weight", "score.weights", false),
            ("score.*", "score.weight", true),
            ("score.*", "score.", true),
            ("score.*", "model.score.weight", false),
            ("*", "", true),
            ("*.weight", "model.layers.0.mlp.up_proj.weight", true),
            ("model.layers.?.*", "model.layers.3.mlp.up_proj.weight", true),
            ("model.layers.?.*", "model.layers.13.mlp.up_proj.weight", false),
            ("*.layers.*.mlp.*", "model.layers.13.mlp.up_proj.weight", true),
            ("*a*b*c", "xxaxxbxxbxxcxc", true),
            ("*a*b*c", "xxaxxbxxbxxcxd", false),
            ("?", "ü", true),
        ] {
            assert_eq!(matches(pattern, name), expected, "{pattern} {name}");
        }
    }

    #[test]
    fn many_stars_do_not_take_for_ever() {
        assert!(!matches(&"*a".repeat(200), &"a".repeat(199)));
        assert!(matches(&"*a".repeat(200), &"a".repeat(2000)));
    }

    #[test]
    fn what_other_dialects_read_is_refused() {
        let said = Glob::try_new("score.[0-9]").unwrap_err();
        assert_eq!(said, "\"score.[0-9]\": '[' has no meaning here, expected a tensor name in which `*` and `?` are wildcards");
        assert_eq!(Glob::try_new("").unwrap_err(), "expected a pattern, found empty text");
    }

    /// The definition, without any thought of time.
    fn by_definition(pattern: &[char], name: &[char]) -> bool {
        match pattern.split_first() {
            None => name.is_empty(),
            Some(('*', rest)) => (0..=name.len()).any(|taken| by_definition(rest, &name[taken..])),
            Some((c, rest)) => name.split_first().is_some_and(|(first, left)| (*c == '?' || c == first) && by_definition(rest, left)),
        }
    }

    proptest! {
        #[test]
        fn matching_is_what_the_definition_says(pattern in "[ab.*?]{1,8}", name in "[ab.]{0,10}") {
            let (p, n): (Vec<char>, Vec<char>) = (pattern.chars().collect(), name.chars().collect());
            prop_assert_eq!(matches(&pattern, &name), by_definition(&p, &n));
        }
    }
}
