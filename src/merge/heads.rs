//! What members must have in common about their heads, beside the tensors that are averaged.

use crate::checkpoint::{Architecture, Elements, Layout, TensorSource};

/// A constant inside a head is a handful of numbers; more is no constant.
const MAX_CONSTANT: usize = 1 << 20;

/// Why the head of one member cannot be averaged with that of another: sentences about `theirs`.
pub fn differences(ours: (&Layout, &dyn TensorSource), theirs: (&Layout, &dyn TensorSource)) -> Vec<String> {
    let mut problems = Vec::new();
    if ours.0.head.pooling != theirs.0.head.pooling {
        let name = |layout: &Layout| layout.head.pooling.map_or("the family's own", |pooling| pooling.name());
        let (expected, found) = (name(ours.0), name(theirs.0));
        problems
            .push(format!("pooling: expected {expected}, found {found}; set `pooling` in the recipe if both were trained the same way"));
    }
    for tensor in ours.0.head.constants() {
        match (whole(ours.1, tensor), whole(theirs.1, tensor)) {
            (Ok(ours), Ok(theirs)) if ours == theirs => {}
            (Ok(_), Ok(_)) => {
                problems.push(format!("tensor {tensor:?} is a constant of the head, and has other numbers: it is not averaged"))
            }
            (Err(problem), _) | (_, Err(problem)) => problems.push(problem),
        }
    }
    problems
}

/// A small tensor, widened so that members of different dtypes compare.
fn whole(source: &dyn TensorSource, tensor: &str) -> Result<Vec<f64>, String> {
    let count = source.manifest().get(tensor).map_or(0, |info| info.elements());
    if count > MAX_CONSTANT {
        return Err(format!("tensor {tensor:?}: expected a constant of at most {MAX_CONSTANT} numbers, found {count}"));
    }
    let mut elements = Elements::default();
    source.read(tensor, 0..count, &mut elements).map_err(|error| error.to_string())?;
    Ok(match &elements {
        Elements::F64(values) => values.clone(),
        Elements::F32(values) => values.iter().map(|value| f64::from(*value)).collect(),
        Elements::F16(values) => values.iter().map(|value| value.to_f64()).collect(),
        Elements::Bf16(values) => values.iter().map(|value| value.to_f64()).collect(),
        _ => return Err(format!("tensor {tensor:?}: expected floating-point numbers, found integers")),
    })
}

/// What is worth knowing of the head of the member `name`.
pub fn notes(name: &str, architecture: &Architecture) -> Vec<String> {
    let normal = architecture.head.normal.map(|(mean, std)| {
        format!(
            "member {name:?}: its config holds mean {mean} and std {std} of its training rewards (OpenRLHF); they are neither averaged nor used: \
             rewards are raw, unless `calibration.from_config` is set for a single member"
        )
    });
    normal.into_iter().collect()
}
