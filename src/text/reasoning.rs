//! Thinking blocks, and how to take them out of what is judged. Pure.
//!
//! A policy that thinks writes `<think>why</think>answer`. Where its prompt ends with the opening tag, the answer that comes
//! here begins in the middle: `why</think>answer`. What never closes was cut off in the middle of a thought, and no score
//! of it would mean anything.

use serde_json::Map;

use crate::domain::{Conversation, Turn};

/// The pairs of tags in use. A text is read by the first pair of which it holds a tag.
const TAGS: [(&str, &str); 6] = [
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<reasoning>", "</reasoning>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
];

/// Fields of a message that hold reasoning beside the content.
const FIELDS: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// A thinking block that never closes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the reasoning does not end: {expected} never comes (reasoning: strip)")]
pub(super) struct Unfinished {
    expected: &'static str,
}

/// Whether a text ends with an opening tag, so that what follows it is reasoning.
pub(super) fn is_open(text: &str) -> bool {
    without_opening(text).len() < text.len()
}

/// A text without the opening tag at its end.
pub(super) fn without_opening(text: &str) -> &str {
    let end = text.trim_end();
    TAGS.iter().find_map(|(open, _)| end.strip_suffix(open)).unwrap_or(text)
}

/// The text without its thinking blocks and the line breaks after them. `opened`: it begins inside of one.
pub(super) fn strip(text: &str, opened: bool) -> Result<String, Unfinished> {
    let tagged = TAGS.iter().find(|(open, close)| text.contains(open) || text.contains(close));
    let &(open, close) = match tagged {
        Some(tags) => tags,
        None if opened => return Err(Unfinished { expected: TAGS[0].1 }),
        None => return Ok(text.to_owned()),
    };
    // A closing tag with no opening one before it: the opening one sits in the prompt.
    let first = |tag: &str| text.find(tag).unwrap_or(usize::MAX);
    let mut inside = opened || first(close) < first(open);
    let (mut rest, mut kept) = (text, String::with_capacity(text.len()));
    loop {
        if inside {
            let Some((_, after)) = rest.split_once(close) else { return Err(Unfinished { expected: close }) };
            rest = after.trim_start_matches(['\n', '\r']);
            inside = false;
        } else if let Some((before, after)) = rest.split_once(open) {
            kept.push_str(before);
            rest = after;
            inside = true;
        } else {
            kept.push_str(rest);
            return Ok(kept);
        }
    }
}

/// A conversation without what its assistants thought. `opened`: the model's template ends prompts with an opening tag, so
/// that the answer that is judged begins inside of a block.
pub(super) fn strip_conversation(conversation: &Conversation, opened: bool) -> Result<Conversation, Unfinished> {
    let last = conversation.turns().count() - 1;
    let turns = conversation.turns().enumerate().map(|(index, turn)| {
        if turn.role() != "assistant" && turn.role() != "model" {
            return Ok(turn.clone());
        }
        let beside = FIELDS.iter().any(|name| turn.extra().get(*name).is_some_and(|value| !value.is_null()));
        // Reasoning that stands in a field of its own was closed by whoever took it apart.
        let content = strip(turn.content(), opened && index == last && !beside)?;
        let extra: Map<_, _> =
            turn.extra().iter().filter(|(name, _)| !FIELDS.contains(&name.as_str())).map(|(n, v)| (n.clone(), v.clone())).collect();
        Ok(turn.with(content, extra))
    });
    let turns: Vec<Turn> = turns.collect::<Result<_, _>>()?;
    Ok(conversation.with_turns(turns))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn blocks_go_with_the_line_breaks_after_them() {
        for (text, left) in [
            ("<think>\nwhy\n</think>\n\nanswer", "answer"),
            ("why\n</think>\n\nanswer", "answer"),
            ("a <think>b</think>c <think>d</think>\ne", "a c e"),
            ("[THINK]x[/THINK]y", "y"),
            ("no tags, 1 < 2", "no tags, 1 < 2"),
            ("<think></think>", ""),
            ("a</think>b<think>c</think>d", "bd"),
        ] {
            assert_eq!(strip(text, false).as_deref(), Ok(left), "{text}");
        }
    }

    #[test]
    fn what_never_closes_is_told() {
        for (text, opened) in [("<think>why", false), ("why", true), ("", true), ("a</think>b<think>c", false), ("[THINK]", false)] {
            assert!(strip(text, opened).is_err(), "{text}");
        }
        assert_eq!(strip("why</think>answer", true).as_deref(), Ok("answer"));
        // The prompt has the opening tag and the answer repeats it.
        assert_eq!(strip("<think>why</think>answer", true).as_deref(), Ok("answer"));
    }

    #[test]
    fn an_opening_tag_at_the_end_of_a_prompt_is_seen() {
        assert!(is_open("<|assistant|>\n<think>\n") && is_open("[THINK]"));
        assert!(!is_open("<think>\n</think>\n") && !is_open("x"));
        assert_eq!(without_opening("ask <think>\n"), "ask ");
    }

    proptest! {
        #[test]
        fn nothing_that_is_left_holds_a_tag(parts in prop::collection::vec(prop_oneof![Just("<think>"), Just("</think>"), Just("a"), Just("\n")], 0..9), opened in any::<bool>()) {
            let text = parts.concat();
            if let Ok(left) = strip(&text, opened) {
                prop_assert!(!left.contains("<think>"), "{text:?} {left:?}");
            }
        }
    }
}
