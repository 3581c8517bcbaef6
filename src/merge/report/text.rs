//! A report for people.

use std::fmt;

use super::verdict::{NORM_RATIO, SUPERVISED, WEIGHT_COSINE, degrees, highest, lowest};
use super::{Around, Report, Section, Standing};

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let around = match self.around {
            Around::Init => "task vectors from init",
            Around::Merge => "differences to the merge, as there is no init",
        };
        writeln!(f, "weight-space report on the {} merge of {} members: {around}", self.method, self.members.len())?;
        let width = self.members.iter().map(|member| member.name.len()).max().unwrap_or_default().max(6);
        writeln!(f, "\n{:width$}  {:>11}  {:>9}  {:>11}  {:>11}  dtype", "member", "coefficient", "norm", "of weights", "to merge")?;
        for (i, member) in self.members.iter().enumerate() {
            let at = |list: &[f64]| list.get(i).copied().unwrap_or_default();
            let (norm, weights, distance) = (at(&self.overall.norms), at(&self.overall.weight_norms), at(&self.overall.distances));
            let share = if weights > 0.0 { 100.0 * norm / weights } else { 0.0 };
            let dtypes = member.dtypes.join("+");
            let name = &member.name;
            writeln!(f, "{name:width$}  {:>11.6}  {norm:>9.4}  {share:>9.3} %  {distance:>11.4}  {dtypes}", member.coefficient)?;
        }
        let [from, to] = SUPERVISED;
        let [low, high] = NORM_RATIO;
        let width = self.layers.iter().map(|layer| layer.name.len()).max().unwrap_or_default().clamp(16, 60);
        writeln!(
            f,
            "\n{:width$}  {:>19}  {:>13}  {:>11}  {:>15}  {:>9}",
            "lowest to highest of", "norm", "angle", "norm ratio", "weight cosine", "to merge"
        )?;
        let sections = [Some(&self.overall), Some(&self.body), self.head.as_ref()];
        for section in sections.into_iter().flatten().chain(&self.layers) {
            writeln!(f, "{}", Line(section, width))?;
        }
        writeln!(
            f,
            "{:width$}  {:>19}  {:>13}  {:>11}  {:>15}",
            "published (WARP)",
            "",
            format!("{from:.0}-{to:.0}, RL 90"),
            format!("{low}-{high}"),
            format!("{WEIGHT_COSINE} and more")
        )?;
        for finding in &self.verdict {
            let sign = match finding.standing {
                Standing::Good => "ok",
                Standing::Doubtful => "doubtful",
                Standing::Bad => "bad",
            };
            write!(f, "\n{sign}: {}", finding.words)?;
        }
        Ok(())
    }
}

/// One row: what lies between the members.
struct Line<'s>(&'s Section, usize);

impl fmt::Display for Line<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(section, width) = *self;
        let range = |list: &[f64]| {
            let (low, high) = list.iter().fold((f64::INFINITY, 0.0_f64), |(low, high), &x| (low.min(x), high.max(x)));
            if list.is_empty() { "-".to_owned() } else { format!("{low:.4}-{high:.4}") }
        };
        let angle = match (highest(&section.cosines), lowest(&section.cosines)) {
            (Some((low, ..)), Some((high, ..))) => format!("{:.1}-{:.1}", degrees(low), degrees(high)),
            _ => "-".to_owned(),
        };
        let ratios = section.norm_ratios.iter().flatten().flatten();
        let (low, high) = ratios.fold((f64::INFINITY, 0.0_f64), |(low, high), &x| (low.min(x), high.max(x)));
        let ratio = if low.is_finite() { format!("{low:.2}-{high:.2}") } else { "-".to_owned() };
        let cosine = match (lowest(&section.weight_cosines), highest(&section.weight_cosines)) {
            (Some((low, ..)), Some((high, ..))) => format!("{low:.4}-{high:.4}"),
            _ => "-".to_owned(),
        };
        let farthest = section.distances.iter().copied().fold(0.0, f64::max);
        let (name, norms) = (&section.name, range(&section.norms));
        write!(f, "{name:width$}  {norms:>19}  {angle:>13}  {ratio:>11}  {cosine:>15}  {farthest:>9.4}")
    }
}
