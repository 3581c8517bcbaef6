//! What a sample costs a pack: its tokens, and its attention in terms of tokens. Pure.

use crate::checkpoint::Architecture;

/// What computing the tokens at positions `from..to` of a sample takes, in tokens that attend to nothing.
pub fn token_cost(architecture: &Architecture, from: usize, to: usize) -> usize {
    let a = architecture;
    let attention = (a.heads * a.head_dim) as f64;
    let projections = a.hidden_size as f64 * (2.0 * attention + 2.0 * (a.kv_heads * a.head_dim) as f64);
    let mlp = (if a.gated { 3 } else { 2 }) as f64 * (a.hidden_size * a.intermediate_size) as f64;
    // Every query meets every key twice: once for the score and once for the value.
    let pair = 2.0 * attention / (projections + mlp).max(1.0);
    let pairs = |window: Option<usize>| {
        let window = window.unwrap_or(usize::MAX);
        if a.causal { seen_before(to, window) - seen_before(from, window) } else { (to - from) as f64 * to.min(window) as f64 }
    };
    let mean = a.layers.iter().map(|layer| pairs(layer.window)).sum::<f64>() / a.layers.len().max(1) as f64;
    to - from + (pair * mean) as usize
}

/// Pairs of queries and keys of the first `tokens` positions, where each sees itself and what comes before it in its window.
fn seen_before(tokens: usize, window: usize) -> f64 {
    let (tokens, window) = (tokens as f64, window as f64);
    let short = tokens.min(window);
    short * (short + 1.0) / 2.0 + (tokens - short) * short
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn architecture(window: Option<usize>) -> Architecture {
        let config = json!({
            "model_type": "mistral", "hidden_size": 100, "intermediate_size": 200, "num_attention_heads": 10, "num_key_value_heads": 10,
            "head_dim": 10, "num_hidden_layers": 3, "vocab_size": 50, "max_position_embeddings": 100_000, "id2label": {"0": "LABEL_0"},
            "sliding_window": window,
        });
        Architecture::parse(&config).expect("valid")
    }

    #[test]
    fn a_token_that_sees_many_keys_costs_more() {
        // 100,000 products a token and layer, 200 for every key that it sees.
        let full = architecture(None);
        assert_eq!(token_cost(&full, 0, 1000), 1000 + 1000 * 1001 / 2 / 500);
        assert_eq!(token_cost(&full, 1000, 1000), 0);
        let halves = token_cost(&full, 0, 700) + token_cost(&full, 700, 2000);
        assert!(halves.abs_diff(token_cost(&full, 0, 2000)) <= 1);
        // Behind the first thousand, every query of a window sees a thousand keys: two tokens' worth.
        let windowed = architecture(Some(1000));
        assert_eq!(token_cost(&windowed, 1000, 2000), 1000 + 1000 * 1000 / 500);
        assert_eq!(token_cost(&windowed, 0, 1000), token_cost(&full, 0, 1000));
    }
}
