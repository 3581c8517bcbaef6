//! The name of merged weights. Pure: what they depend on in, a hash out, so that it is known before any weight is read
//! wherever content hashes are.

use super::MergePlan;
use super::content::hash_text;
use super::recipe::{Kind, Method, Rule, Take};
use crate::checkpoint::Dtype;
use crate::domain::WeightsId;

/// What a name covers beside its sources.
pub struct Named<'r> {
    pub kind: Kind,
    pub method: Method,
    pub liti: Option<f64>,
    pub rules: &'r [Rule],
    pub dtype: Dtype,
}

impl MergePlan {
    /// The name of the merged weights, from [`super::PlannedSource::content_hash`] of every member in order and, if init is
    /// read, of init.
    pub fn weights_id(&self, members: &[[u8; 32]], init: Option<[u8; 32]>) -> WeightsId {
        let recipe = self.recipe();
        let named =
            Named { kind: recipe.kind(), method: recipe.method(), liti: recipe.liti(), rules: recipe.rules(), dtype: recipe.dtype() };
        let members: Vec<(f64, [u8; 32])> = self.members().iter().map(|member| member.coefficient()).zip(members.iter().copied()).collect();
        weights_id(&named, &members, init)
    }
}

/// BLAKE3 over kind, method with its numbers, LITI, output dtype, coefficient and content hash of every member in order,
/// init, and the rules, in which members are known by their places.
pub fn weights_id(named: &Named<'_>, members: &[(f64, [u8; 32])], init: Option<[u8; 32]>) -> WeightsId {
    let mut hasher = blake3::Hasher::new_derive_key("warm weights id 2");
    hash_text(&mut hasher, named.kind.name());
    hash_text(&mut hasher, named.method.name());
    match named.method {
        Method::Linear => {}
        Method::Slerp { granularity, t } => {
            hash_text(&mut hasher, granularity.name());
            hash_number(&mut hasher, t);
        }
        Method::Ema { mu } => hash_number(&mut hasher, mu),
    }
    hash_number(&mut hasher, named.liti.unwrap_or(1.0));
    hash_text(&mut hasher, named.dtype.safetensors_name());
    hash_count(&mut hasher, members.len());
    for (coefficient, hash) in members {
        hash_number(&mut hasher, *coefficient);
        hasher.update(hash);
    }
    hash_count(&mut hasher, usize::from(init.is_some()));
    hasher.update(&init.unwrap_or_default());
    hash_count(&mut hasher, named.rules.len());
    for rule in named.rules {
        hash_text(&mut hasher, rule.pattern.as_str());
        match &rule.take {
            Take::From(member) => {
                hash_text(&mut hasher, "from");
                hash_count(&mut hasher, *member);
            }
            Take::Init => hash_text(&mut hasher, "init"),
            Take::Mix(coefficients) => {
                hash_text(&mut hasher, "mix");
                coefficients.as_slice().iter().for_each(|&coefficient| hash_number(&mut hasher, coefficient));
            }
        }
    }
    WeightsId(*hasher.finalize().as_bytes())
}

fn hash_number(hasher: &mut blake3::Hasher, number: f64) {
    hasher.update(&number.to_bits().to_le_bytes());
}

fn hash_count(hasher: &mut blake3::Hasher, count: usize) {
    hasher.update(&(count as u64).to_le_bytes());
}
