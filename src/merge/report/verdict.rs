//! What the numbers of a report say, in words. The limits are those of the papers where they give any; for reward models
//! no values are published, so a verdict is a hint to look closer and never refuses a merge.

use serde::Serialize;

use super::{Around, Report, Section};

/// WARP, Fig. 10c and App. C.2: whole weights of fine-tunings of one model.
pub const WEIGHT_COSINE: f64 = 0.999;
/// WARP, App. C.2: angles of task vectors of supervised fine-tunings, in degrees; those of reinforcement learning are
/// about 90.
pub const SUPERVISED: [f64; 2] = [40.0, 80.0];
/// WARP, App. C.2: one task vector's norm by another's.
pub const NORM_RATIO: [f64; 2] = [0.95, 1.15];
/// Below this, weights do not come from one initialisation: independent ones have cosines near 0.
const UNRELATED: f64 = 0.9;
/// Heads below this did not begin as one; random heads have cosines near 0, heads that were probed once and then tuned
/// stay near 1.
const OTHER_HEAD: f64 = 0.5;
const SAME_HEAD: f64 = 0.9;
/// A member that is this many times further from the merge than the middle one.
const FAR: f64 = 2.0;

/// How a premise stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Standing {
    /// As in the papers, or as it should be.
    Good,
    /// Outside of what the papers report.
    Doubtful,
    /// Against what averaging rests on.
    Bad,
}

/// One thing that the report says.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Finding {
    /// `shared_init`, `head`, `angles`, `norm_ratios`, `far_off` or `duplicates`.
    pub about: &'static str,
    pub standing: Standing,
    pub words: String,
}

pub fn verdict(report: &Report) -> Vec<Finding> {
    let finders = [shared_init, head, angles, norm_ratios, far_off, duplicates];
    finders.iter().filter_map(|find| find(report)).collect()
}

/// The lowest of a symmetric table, with its place.
pub fn lowest(table: &[Vec<Option<f64>>]) -> Option<(f64, usize, usize)> {
    pairs(table).min_by(|a, b| a.0.total_cmp(&b.0))
}

pub fn highest(table: &[Vec<Option<f64>>]) -> Option<(f64, usize, usize)> {
    pairs(table).max_by(|a, b| a.0.total_cmp(&b.0))
}

/// What stands below the diagonal.
fn pairs(table: &[Vec<Option<f64>>]) -> impl Iterator<Item = (f64, usize, usize)> {
    let rows = table.iter().enumerate();
    rows.flat_map(|(i, row)| row.iter().take(i).enumerate().filter_map(move |(j, cell)| cell.map(|cell| (cell, j, i))))
}

/// The angle of a cosine, in degrees.
pub fn degrees(cosine: f64) -> f64 {
    libm::acos(cosine.clamp(-1.0, 1.0)).to_degrees()
}

fn name(report: &Report, index: usize) -> &str {
    report.members.get(index).map_or("?", |member| member.name.as_str())
}

fn shared_init(report: &Report) -> Option<Finding> {
    let between =
        lowest(&report.body.weight_cosines).map(|(cosine, i, j)| (cosine, format!("{} and {}", name(report, i), name(report, j))));
    let to_init = report.body.init_cosines.iter().flatten().enumerate();
    let to_init = to_init.filter_map(|(i, cosine)| cosine.map(|cosine| (cosine, format!("init and {}", name(report, i)))));
    let (cosine, who) = to_init.chain(between).min_by(|a, b| a.0.total_cmp(&b.0))?;
    let lowest = format!("the lowest cosine of whole weights is {cosine:.5} ({who})");
    let (standing, words) = if cosine >= WEIGHT_COSINE {
        (Standing::Good, format!("a shared initialisation is plausible: {lowest}; fine-tunings of one model have {WEIGHT_COSINE} and more"))
    } else if cosine >= UNRELATED {
        let words = format!(
            "a shared initialisation is possible, but members have moved further than any published: {lowest}, expected {WEIGHT_COSINE} and more"
        );
        (Standing::Doubtful, words)
    } else {
        let words = format!(
            "a shared initialisation is not plausible: {lowest}; weights that were not fine-tuned from one model do not average to a model"
        );
        (Standing::Bad, words)
    };
    Some(Finding { about: "shared_init", standing, words })
}

fn head(report: &Report) -> Option<Finding> {
    let (cosine, i, j) = lowest(&report.head.as_ref()?.weight_cosines)?;
    let found = format!("the lowest cosine of two heads is {cosine:.3} ({} and {})", name(report, i), name(report, j));
    let (standing, words) = if cosine >= SAME_HEAD {
        (Standing::Good, format!("heads are of one origin: {found}"))
    } else if cosine >= OTHER_HEAD {
        (Standing::Doubtful, format!("heads have moved far from each other: {found}"))
    } else {
        let words = format!(
            "head initialisations differ: {found}; WARM starts all members from one probed head, and heads of different initialisation may not be connected (2205.12411): check the merge on labelled pairs"
        );
        (Standing::Bad, words)
    };
    Some(Finding { about: "head", standing, words })
}

fn angles(report: &Report) -> Option<Finding> {
    let (low, high) = (highest(&report.body.cosines)?.0, lowest(&report.body.cosines)?.0);
    let (low, high) = (degrees(low), degrees(high));
    let range = format!("{low:.1} to {high:.1} degrees");
    if report.body.around == Around::Merge {
        // Deviations from a mean sum to zero, so that independent ones have this angle.
        let independent = degrees(-1.0 / (report.members.len() as f64 - 1.0));
        let words =
            format!("around the merge, members have angles of {range} (independent ones: {independent:.1}); name init to see task vectors");
        return Some(Finding { about: "angles", standing: Standing::Good, words });
    }
    let [from, to] = SUPERVISED;
    let (standing, what) = match (low + high) / 2.0 {
        middle if middle < from => {
            (Standing::Doubtful, "closer to each other than separate fine-tunings are, which leaves little for averaging to gain")
        }
        middle if middle <= to => (Standing::Good, "as of supervised fine-tunings"),
        middle if middle <= 100.0 => (
            Standing::Good,
            "nearly at right angles, as after reinforcement learning; a linear merge shortens such vectors, slerp does not",
        ),
        _ => (Standing::Doubtful, "against each other, so that an average cancels what they have learned"),
    };
    let words = format!("task vectors have angles of {range}: {what} (supervised: {from:.0} to {to:.0}, reinforcement learning: about 90)");
    Some(Finding { about: "angles", standing, words })
}

fn norm_ratios(report: &Report) -> Option<Finding> {
    // Of both directions of a pair the one above 1.
    let larger = |row: &Vec<Option<f64>>| row.iter().flatten().copied().fold(1.0, f64::max);
    lowest(&report.body.norm_ratios)?;
    let ratio = report.body.norm_ratios.iter().map(larger).fold(1.0, f64::max);
    let [low, high] = NORM_RATIO;
    let (standing, what) = if ratio <= high { (Standing::Good, "as in") } else { (Standing::Doubtful, "more than in") };
    let of = if report.body.around == Around::Init { "task vector" } else { "difference to the merge" };
    let words = format!("the longest {of} is {ratio:.3} times the shortest, {what} the papers ({low} to {high})");
    // Around a merge of two, both differences are as long as the coefficients say.
    (report.body.around == Around::Init || report.members.len() > 2).then_some(Finding { about: "norm_ratios", standing, words })
}

fn far_off(report: &Report) -> Option<Finding> {
    let Section { distances, norms, around, .. } = &report.body;
    // With two members and no init, distances are what the coefficients make them.
    let lengths = match (around, distances.len()) {
        (_, 3..) => distances,
        (Around::Init, 2) => norms,
        _ => return None,
    };
    let mut sorted = lengths.clone();
    sorted.sort_by(f64::total_cmp);
    let middle = *sorted.get((sorted.len() - 1) / 2)?;
    let far: Vec<&str> = lengths.iter().enumerate().filter(|(_, length)| **length > FAR * middle).map(|(i, _)| name(report, i)).collect();
    let (standing, words) = match far.as_slice() {
        [] => (Standing::Good, "no member is far off".to_owned()),
        [one] => (Standing::Bad, format!("{one} is far off: more than {FAR} times as far as the middle one; try the merge without it")),
        many => (Standing::Bad, format!("{} are far off: more than {FAR} times as far as the middle one", many.join(", "))),
    };
    Some(Finding { about: "far_off", standing, words })
}

fn duplicates(report: &Report) -> Option<Finding> {
    let same: Vec<String> = report.duplicates.iter().map(|pair| pair.join(" and ")).collect();
    let words = format!("the same weights twice: {}; a member that repeats another adds weight and no information", same.join(", "));
    (!same.is_empty()).then_some(Finding { about: "duplicates", standing: Standing::Doubtful, words })
}
