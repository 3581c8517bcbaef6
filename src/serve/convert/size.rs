//! What a request takes in memory once it is read, told before anything of it is copied. Pure.

use crate::wire::{self, completion::Kind, prompt_group::Prompt, sample::Input};

/// What a sample or a message takes beside its text, on its way to the device.
const EACH: usize = 256;
/// What a value of JSON takes beside its text, or a field of an object with its value.
const JSON_VALUE: usize = 96;

/// What a request of these parts takes, in bytes, at most. Texts and ids are copied for every completion; what stands beside
/// a conversation, and the conversation itself, is shared by all completions.
pub fn held_bytes(samples: &[wire::Sample], groups: &[wire::PromptGroup], pairs: &[wire::PreferencePair]) -> u64 {
    let total: usize = samples.iter().map(sample).chain(groups.iter().map(group)).chain(pairs.iter().map(pair)).sum();
    total as u64
}

/// What a request to score takes in memory, in bytes, at most.
pub fn score_bytes(request: &wire::ScoreRequest) -> u64 {
    held_bytes(&request.samples, &request.groups, &[])
}

/// What a request to compare takes in memory, in bytes, at most.
pub fn compare_bytes(request: &wire::CompareRequest) -> u64 {
    held_bytes(&request.samples, &request.groups, &request.pairs)
}

fn sample(sample: &wire::Sample) -> usize {
    EACH + match &sample.input {
        None => 0,
        Some(Input::Conversation(turns)) => conversation(turns),
        Some(Input::Text(text)) => text.len(),
        Some(Input::Pair(wire::TextPair { first, second })) => first.len() + second.len(),
        Some(Input::Tokens(tokens)) => 4 * tokens.ids.len(),
    }
}

fn group(group: &wire::PromptGroup) -> usize {
    let count = group.completions.len().max(1);
    let prompt = match &group.prompt {
        None => 0,
        Some(Prompt::Conversation(prompt)) => conversation(prompt),
        Some(Prompt::Text(text)) => text.len().saturating_mul(count),
        Some(Prompt::Tokens(tokens)) => (4 * tokens.ids.len()).saturating_mul(count),
    };
    group.completions.iter().map(completion).fold(prompt, usize::saturating_add)
}

fn pair(pair: &wire::PreferencePair) -> usize {
    let sides = [&pair.chosen, &pair.rejected].into_iter().flatten().map(completion).sum::<usize>();
    pair.prompt.as_ref().map_or(0, conversation) + sides
}

fn completion(completion: &wire::Completion) -> usize {
    EACH + match &completion.kind {
        None => 0,
        Some(Kind::Text(text)) => text.len(),
        Some(Kind::Tokens(tokens)) => 4 * tokens.ids.len(),
        Some(Kind::Messages(messages)) => conversation(messages),
    }
}

fn conversation(conversation: &wire::Conversation) -> usize {
    let message = |message: &wire::Message| EACH + message.role.len() + message.content.len() + json(&message.extra_json);
    conversation.messages.iter().map(message).sum::<usize>() + json(&conversation.tools_json) + json(&conversation.template_args_json)
}

/// A value of JSON begins after one of these, or at the beginning.
fn json(text: &str) -> usize {
    if text.is_empty() {
        return 0;
    }
    let values = 1 + text.bytes().filter(|byte| matches!(byte, b',' | b':' | b'[' | b'{')).count();
    text.len() + JSON_VALUE * values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_counts_once_for_every_completion_and_a_conversation_once() {
        let completions = || vec![wire::Completion { kind: Some(Kind::Text("a".into())) }; 100];
        let text = Prompt::Text("x".repeat(10_000));
        let message = wire::Message { content: "x".repeat(10_000), ..Default::default() };
        let shared = Prompt::Conversation(wire::Conversation { messages: vec![message], ..Default::default() });
        let bytes = |prompt| held_bytes(&[], &[wire::PromptGroup { prompt: Some(prompt), completions: completions() }], &[]);
        assert!((1_000_000..1_100_000).contains(&bytes(text)));
        assert!((10_000..50_000).contains(&bytes(shared)));
    }

    #[test]
    fn json_of_many_small_values_counts_as_what_it_becomes() {
        let tools = format!("[{}0]", "0,".repeat(1000));
        let conversation = wire::Conversation { tools_json: tools, ..Default::default() };
        let bytes = held_bytes(&[wire::Sample { input: Some(Input::Conversation(conversation)) }], &[], &[]);
        assert!(bytes as usize > 1000 * size_of::<serde_json::Value>(), "{bytes}");
    }
}
