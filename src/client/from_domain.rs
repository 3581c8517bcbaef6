//! Domain values as the wire carries them.

use serde_json::{Map, Value};

use crate::domain::{Completion, Conversation, Prompt, PromptGroup, Sample, Turn};
use crate::wire;

/// A sample as a request carries it.
pub fn sample_to_wire(sample: &Sample) -> wire::Sample {
    use wire::sample::Input;
    let input = match sample {
        Sample::Conversation(conversation) => Input::Conversation(conversation_to_wire(conversation)),
        Sample::Text(text) => Input::Text(text.clone()),
        Sample::Pair { first, second } => Input::Pair(wire::TextPair { first: first.clone(), second: second.clone() }),
        Sample::Tokens(ids) => Input::Tokens(wire::TokenIds { ids: ids.clone() }),
    };
    wire::Sample { input: Some(input) }
}

/// A group as a request carries it.
pub fn group_to_wire(group: &PromptGroup) -> wire::PromptGroup {
    use wire::{completion::Kind, prompt_group::Prompt as WirePrompt};
    let prompt = match group.prompt() {
        Prompt::Conversation(conversation) => WirePrompt::Conversation(conversation_to_wire(conversation)),
        Prompt::Text(text) => WirePrompt::Text(text.clone()),
        Prompt::Tokens(ids) => WirePrompt::Tokens(wire::TokenIds { ids: ids.clone() }),
    };
    let completions = group.completions().iter().map(|completion| {
        let kind = match completion {
            Completion::Text(text) => Kind::Text(text.clone()),
            Completion::Turns(turns) => {
                let messages = turns.iter().map(turn_to_wire).collect();
                Kind::Messages(wire::Conversation { messages, ..Default::default() })
            }
            Completion::Tokens(ids) => Kind::Tokens(wire::TokenIds { ids: ids.clone() }),
        };
        wire::Completion { kind: Some(kind) }
    });
    wire::PromptGroup { completions: completions.collect(), prompt: Some(prompt) }
}

fn conversation_to_wire(conversation: &Conversation) -> wire::Conversation {
    wire::Conversation {
        messages: conversation.turns().map(turn_to_wire).collect(),
        tools_json: conversation.tools().map(Value::to_string).unwrap_or_default(),
        template_args_json: object_to_json(conversation.template_args()),
    }
}

fn turn_to_wire(turn: &Turn) -> wire::Message {
    wire::Message { role: turn.role().to_owned(), content: turn.content().to_owned(), extra_json: object_to_json(turn.extra()) }
}

fn object_to_json(object: &Map<String, Value>) -> String {
    if object.is_empty() { String::new() } else { serde_json::to_string(object).unwrap_or_default() }
}
