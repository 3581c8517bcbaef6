//! What a configuration and an operator say of the reward head, beside its tensors.

use serde::Serialize;
use serde_json::{Map, Value};

use super::{Activation, Pooling};

/// The head's part of an [`super::Architecture`]. What does not reach a score once the head is found (names, and numbers
/// that are only reported) takes no part in comparing members.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct HeadConfig {
    /// `architectures[0]`: a hint, never a proof.
    #[serde(skip)]
    pub class: Option<String>,
    /// `value_head_prefix`: OpenRLHF's name for its head.
    #[serde(skip)]
    pub prefix: Option<String>,
    /// OpenRLHF's `mean` and `std` of training rewards, which belong to one member and are never averaged.
    #[serde(skip)]
    pub normal: Option<(f64, f64)>,
    /// The activation between the dense layer of a classifier and its outputs, where the configuration states it.
    pub activation: Option<Activation>,
    /// The epsilon of a norm inside the head.
    pub norm_eps: f64,
    /// `tanh(logit / cap) * cap` on the rows of the language-model head.
    pub softcap: Option<f64>,
    /// `tie_word_embeddings`, where the configuration has it.
    #[serde(skip)]
    pub tied: Option<bool>,
    /// The token that must end every sequence, and at which the head reads (InternLM2).
    pub reward_token: Option<u32>,
    /// The temperature of a gating network.
    pub gate_temperature: f64,
    /// What the operator decides, or what a merge was made with and has recorded under `warm` in its configuration.
    #[serde(skip)]
    pub choice: HeadChoice,
}

/// The key of a configuration under which a merge records the choices it was made with, as a recipe writes them: without
/// them the same weights would be read in another way.
pub const RECORD_KEY: &str = "warm";

/// What the operator decides: the `head:` and `pooling:` of a recipe.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct HeadChoice {
    pub pooling: Option<Pooling>,
    /// The token of [`Pooling::Token`].
    pub pooling_token: Option<TokenName>,
    /// The head's tensors begin with this.
    pub name: Option<String>,
    /// Rows of the language-model head instead of a reward head.
    pub tokens: Option<TokenRows>,
    pub at: Option<At>,
    pub reduce: Option<Reduce>,
    pub weights: Option<Weights>,
    pub link: Option<Link>,
    /// Where a gating network reads: the last occurrence of this text, at its first token.
    pub gate_at: Option<String>,
}

/// A token as a person names it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum TokenName {
    Id(u32),
    /// Text that the tokenizer makes one token of, or the vocabulary's own name.
    Text(String),
}

/// Which rows of the language-model head speak for and against.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TokenRows {
    pub plus: Vec<TokenName>,
    pub minus: Vec<TokenName>,
}

/// Where a head is applied.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum At {
    /// Once, where the pooling says.
    Last,
    /// At every occurrence of a token: the steps of a process reward model.
    Each(TokenName),
}

/// How the scores of the steps become one reward.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Reduce {
    #[default]
    Last,
    Min,
    Product,
    Mean,
}

impl Reduce {
    pub const ALL: [Self; 4] = [Self::Last, Self::Min, Self::Product, Self::Mean];

    pub fn name(self) -> &'static str {
        match self {
            Self::Last => "last",
            Self::Min => "min",
            Self::Product => "product",
            Self::Mean => "mean",
        }
    }

    /// Of at least one value, in order.
    pub fn apply(self, values: &[f64]) -> f64 {
        match self {
            Self::Last => values.last().copied().unwrap_or(f64::NAN),
            // A NaN must stay one, so that it is found instead of scored.
            Self::Min => values.iter().copied().reduce(|a, b| if a < b || a.is_nan() { a } else { b }).unwrap_or(f64::NAN),
            Self::Product => values.iter().product(),
            Self::Mean => values.iter().sum::<f64>() / values.len() as f64,
        }
    }
}

/// How several outputs become one reward.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Weights {
    /// One per output, in order.
    List(Vec<f64>),
    /// By the output's name; the others count 0.
    Named(Vec<(String, f64)>),
}

/// What is made of a combined output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Link {
    Logit,
    /// The sigmoid of it; of the difference of two logits, that is the softmax of the two.
    Probability,
}

impl Link {
    pub const ALL: [Self; 2] = [Self::Logit, Self::Probability];

    pub fn name(self) -> &'static str {
        match self {
            Self::Logit => "logit",
            Self::Probability => "probability",
        }
    }

    pub fn apply(self, logit: f64) -> f64 {
        match self {
            Self::Logit => logit,
            Self::Probability => 1.0 / (1.0 + (-logit).exp()),
        }
    }
}

impl HeadConfig {
    /// Reads the head's fields of a `config.json`.
    pub(super) fn parse(map: &Map<String, Value>, problems: &mut Vec<String>) -> Self {
        let get = |name: &str| map.get(name).filter(|value| !value.is_null());
        let mut problem = |name: &str, expected: &str, found: &Value| problems.push(format!("{name}: expected {expected}, found {found}"));
        let mut number = |name: &str| match get(name) {
            None => None,
            Some(value) => match value.as_f64().filter(|number| number.is_finite()) {
                Some(number) => Some(number),
                None => {
                    problem(name, "a finite number", value);
                    None
                }
            },
        };
        // Each family has one of these: DeBERTa's pooler and ModernBERT's prediction head.
        let named = ["pooler_hidden_act", "classifier_activation"].into_iter().find_map(|name| Some((name, get(name)?)));
        let softcap = number("final_logit_softcapping").filter(|cap| *cap > 0.0);
        let gate_temperature = number("gating_temperature").unwrap_or(10.0);
        let normal = number("mean").zip(number("std"));
        let norm_eps = number("norm_eps").unwrap_or(1e-5);
        if gate_temperature <= 0.0 {
            problems.push(format!("gating_temperature: expected a number above 0, found {gate_temperature}"));
        }
        let activation = named.and_then(|(name, value)| {
            let found = value.as_str().and_then(Activation::from_name);
            if found.is_none() {
                problems.push(format!("{name}: expected the name of an activation, found {value}"));
            }
            found
        });
        let text = |name: &str| get(name).and_then(Value::as_str).map(str::to_owned);
        Self {
            class: get("architectures").and_then(|list| Some(list.get(0)?.as_str()?.to_owned())),
            prefix: text("value_head_prefix"),
            normal,
            activation,
            norm_eps,
            softcap,
            tied: get("tie_word_embeddings").and_then(Value::as_bool),
            reward_token: get("reward_token_id").and_then(Value::as_u64).and_then(|id| u32::try_from(id).ok()),
            gate_temperature,
            choice: HeadChoice::recorded(get(RECORD_KEY), problems),
        }
    }

    /// Whether `architectures` says that every token (in use: every step) has a score.
    pub fn says_every_token(&self) -> bool {
        let class = self.class.as_deref().unwrap_or_default();
        ["ForTokenClassification", "ForProcessRewardModel", "ForPrmModel", "ForPRM"].iter().any(|end| class.ends_with(end))
    }

    /// Whether the model code that belongs to the class pools as transformers did before 2025.
    pub(super) fn says_first_pad(&self) -> bool {
        let class = self.class.as_deref().unwrap_or_default();
        class == "INFORMForSequenceClassification" || class.ends_with("ForRewardModel") || class.ends_with("ForRewardModelWithGating")
    }
}

/// Why a model of this configuration is not served at all, if so: a judge that reads images, writes its verdict, or looks
/// at two answers at once.
pub(super) fn out_of_scope(map: &Map<String, Value>) -> Option<String> {
    let text = |name: &str| map.get(name).and_then(Value::as_str).unwrap_or_default();
    let model_type = text("model_type");
    let class = map.get("architectures").and_then(|list| list.get(0)?.as_str()).unwrap_or_default();
    if ["vision_config", "audio_config", "vision_tower", "mm_vision_tower"].iter().any(|name| map.get(*name).is_some_and(|v| !v.is_null()))
    {
        return Some(format!(
            "model_type {model_type:?} reads images or sound: multimodal judges are not served; vLLM and transformers run them"
        ));
    }
    if map.get("is_encoder_decoder") == Some(&Value::Bool(true)) || class.ends_with("ForConditionalGeneration") {
        return Some(format!(
            "model_type {model_type:?} writes its verdict: generative judges are not served; run them in a text-generation server such as vLLM"
        ));
    }
    if class.contains("PairRM") || class.contains("Pairwise") || text("model_type") == "pairrm" {
        return Some(format!(
            "{class} compares two answers in one sequence: pairwise judges are not served; a score here is of one answer"
        ));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_reduced_as_their_names_say() {
        let values = [0.5, 0.25, 0.75];
        assert_eq!(Reduce::ALL.map(|reduce| reduce.apply(&values)), [0.75, 0.25, 0.09375, 0.5]);
        assert!(Reduce::ALL.iter().all(|reduce| reduce.apply(&[f64::NAN]).is_nan()));
        assert!([[f64::NAN, 1.0], [1.0, f64::NAN]].iter().all(|values| Reduce::Min.apply(values).is_nan()));
    }

    #[test]
    fn a_probability_of_two_logits_is_their_softmax() {
        let (plus, minus) = (1.5f64, -0.25f64);
        let softmax = plus.exp() / (plus.exp() + minus.exp());
        assert!((Link::Probability.apply(plus - minus) - softmax).abs() < 1e-15);
        assert_eq!([Link::Probability.apply(-1e9), Link::Probability.apply(1e9)], [0.0, 1.0]);
    }
}
