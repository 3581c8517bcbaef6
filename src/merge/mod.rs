//! Many checkpoints to one: the recipe says which and how, the plan checks that it is possible, and [`Merged`] is the
//! outcome, a checkpoint whose tensors are computed when they are read (WARM, 2401.12187, §3.1: `φ_WARM = (1/M) Σ φ_i`).

mod average;
mod content;
mod heads;
mod merged;
mod plan;
mod recipe;
mod recipe_head;
mod survey;

pub use merged::Merged;
pub use plan::{Input, MergeError, MergePlan, PlannedMember};
pub use recipe::{Coefficients, Member, Method, Recipe, RecipeError, RecipeFile};
