//! The `head:` and `pooling:` of a recipe.

use serde_norway::Mapping;

use super::Recipe;
use crate::checkpoint::HeadChoice;

impl Recipe {
    /// What the operator says of head and pooling.
    pub fn head(&self) -> &HeadChoice {
        &self.head
    }

    /// The same recipe with these choices in the place of its own; what they leave open stays.
    pub fn with_head(mut self, head: Option<HeadChoice>, pooling: Option<HeadChoice>) -> Self {
        let head = head.unwrap_or_default();
        let pooling = pooling.unwrap_or_default();
        self.head = HeadChoice { pooling: pooling.pooling, pooling_token: pooling.pooling_token, ..head }.or(&self.head);
        self
    }
}

/// YAML as JSON, whose reader knows what may be chosen.
pub(super) fn read(recipe: &Mapping, problems: &mut Vec<String>) -> HeadChoice {
    let mut json = |key: &str| {
        let value = serde_json::to_value(recipe.get(key)?);
        value.map_err(|error| problems.push(format!("{key}: {error}"))).ok()
    };
    let (head, pooling) = (json("head"), json("pooling"));
    HeadChoice::parse(head.as_ref(), pooling.as_ref()).unwrap_or_else(|found| {
        problems.extend(found);
        HeadChoice::default()
    })
}
