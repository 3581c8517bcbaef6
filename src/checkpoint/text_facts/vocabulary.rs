//! Which token has which id, for those who mix the rows of two embeddings.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

/// The id of every token: of the model's vocabulary, and the added ones.
pub(super) fn ids(tokenizer: &Map<String, Value>) -> BTreeMap<&str, u64> {
    let mut ids = BTreeMap::new();
    match tokenizer.get("model").and_then(|model| model.get("vocab")) {
        Some(Value::Object(vocabulary)) => ids.extend(vocabulary.iter().filter_map(|(token, id)| Some((token.as_str(), id.as_u64()?)))),
        Some(Value::Array(pieces)) => {
            let pieces = pieces.iter().zip(0..).filter_map(|(piece, id)| Some((piece.get(0)?.as_str()?, id)));
            ids.extend(pieces);
        }
        _ => {}
    }
    let added = tokenizer.get("added_tokens").and_then(Value::as_array).into_iter().flatten();
    ids.extend(added.filter_map(|token| Some((token.get("content")?.as_str()?, token.get("id")?.as_u64()?))));
    ids
}

/// How many tokens both have under different ids, and the first of them.
pub(super) fn conflict(ours: &Map<String, Value>, theirs: &Map<String, Value>) -> Option<(usize, String)> {
    let theirs = ids(theirs);
    let ours = ids(ours);
    let mut conflicts = ours.iter().filter_map(|(token, id)| Some((token, id, theirs.get(token).filter(|other| *other != id)?)));
    let (token, id, other) = conflicts.next()?;
    Some((conflicts.count() + 1, format!("token {token:?} has id {id} in the one and {other} in the other")))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn object(value: Value) -> Map<String, Value> {
        value.as_object().unwrap().clone()
    }

    #[test]
    fn a_token_under_two_ids_is_a_conflict_and_one_that_only_one_has_is_none() {
        let ours = object(json!({"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 2, "content": "<pad>"}]}));
        let more = object(json!({"model": {"vocab": {"a": 0, "b": 1, "c": 3}}, "added_tokens": []}));
        assert_eq!(conflict(&ours, &more), None);
        // All three have moved.
        let moved = object(json!({"model": {"vocab": [["<pad>", 0.0], ["a", -1.0], ["b", -2.0]]}}));
        let expected = "token \"<pad>\" has id 2 in the one and 0 in the other".to_owned();
        assert_eq!(conflict(&ours, &moved), Some((3, expected)));
        assert_eq!(conflict(&ours, &object(json!({"model": 7}))), None);
    }
}
