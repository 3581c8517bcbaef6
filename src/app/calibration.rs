//! The file of a calibration: where the rewards of the merged model and of each member lie on a reference set, and which
//! weights that was measured on, so that the numbers of one model are never used for another.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::domain::{MemberName, Moments};
use crate::registry::{Calibration, MeasuredMembers};

/// A calibration has a few numbers per member; a larger file is another one by mistake.
const MAX_BYTES: u64 = 1 << 20;

/// The file as a whole.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CalibrationFile {
    pub mean: f64,
    /// Of the population.
    pub std: f64,
    #[serde(default)]
    pub samples: u64,
    /// What the reference set is.
    #[serde(default)]
    pub source: String,
    /// The merged weights that were measured, in hex; without it they are taken for the right ones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weights_id: Option<String>,
    #[serde(default)]
    pub members: BTreeMap<String, MemberNumbers>,
}

/// Where the rewards of one member lie.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemberNumbers {
    pub mean: f64,
    pub std: f64,
    #[serde(default)]
    pub samples: u64,
    /// The weights that were measured, in hex.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content_hash: Option<String>,
}

impl CalibrationFile {
    /// Checks every number.
    pub fn resolve(&self) -> Result<(Calibration, MeasuredMembers), String> {
        let check = |who: &str, mean, std, samples| {
            Calibration::new(mean, std, samples, self.source.clone()).map_err(|error| format!("{who}: {error}"))
        };
        let merged = check("the merged model", self.mean, self.std, self.samples)?;
        let members = self.members.iter().map(|(name, numbers)| {
            let calibration = check(name, numbers.mean, numbers.std, numbers.samples)?;
            let name = MemberName::try_from(name.clone()).map_err(|invalid| invalid.to_string())?;
            Ok((name, numbers.content_hash.clone(), calibration))
        });
        let members = members.collect::<Result<Vec<_>, String>>()?;
        Ok((merged, MeasuredMembers { weights_id: self.weights_id.clone(), members }))
    }
}

/// Mean and standard deviation that something can be calibrated by; `who` is told where they are none.
pub fn numbers(who: &str, moments: &Moments) -> Result<(f64, f64), String> {
    match (moments.mean(), moments.std()) {
        (Some(mean), Some(std)) if std > 0.0 && moments.count() > 1 => Ok((mean, std)),
        _ => Err(format!("{who}: {} samples with rewards that do not differ calibrate nothing", moments.count())),
    }
}

/// Reads a calibration file.
pub(super) fn read(path: &Path) -> Result<(Calibration, MeasuredMembers), String> {
    let explain = |problem: String| format!("{}: {problem}", path.display());
    let bytes = std::fs::metadata(path).map_err(|error| explain(error.to_string()))?.len();
    if bytes > MAX_BYTES {
        return Err(explain(format!("has {bytes} bytes, expected at most {MAX_BYTES}")));
    }
    let text = std::fs::read(path).map_err(|error| explain(error.to_string()))?;
    let file: CalibrationFile = serde_json::from_slice(&text).map_err(|error| explain(error.to_string()))?;
    file.resolve().map_err(explain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_again_and_a_short_file_is_enough() {
        let members =
            BTreeMap::from([("rm-0".to_owned(), MemberNumbers { mean: 1.0, std: 2.0, samples: 9, content_hash: Some("ab".into()) })]);
        let file =
            CalibrationFile { mean: 0.5, std: 1.5, samples: 9, source: "val".to_owned(), weights_id: Some("cd".to_owned()), members };
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("calibration.json");
        std::fs::write(&path, serde_json::to_vec(&file).expect("JSON")).expect("written");
        let (merged, measured) = read(&path).expect("valid");
        assert_eq!((merged.mean(), merged.std(), merged.samples(), merged.source()), (0.5, 1.5, 9, "val"));
        assert_eq!(measured.weights_id.as_deref(), Some("cd"));
        let (name, hash, calibration) = &measured.members[0];
        assert_eq!((name.as_str(), hash.as_deref(), calibration.mean()), ("rm-0", Some("ab"), 1.0));
        std::fs::write(&path, "{\"mean\": 0, \"std\": 1}").expect("written");
        assert_eq!(read(&path).expect("short").1, MeasuredMembers::default());
    }

    #[test]
    fn a_file_that_cannot_be_meant_is_refused_by_name() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("calibration.json");
        for (text, words) in [
            ("{\"mean\": 0}", "std"),
            ("{\"mean\": 0, \"std\": 0}", "the merged model"),
            ("{\"mean\": 0, \"std\": 1, \"members\": {\"rm\": {\"mean\": 0, \"std\": -1}}}", "rm: "),
            ("{\"mean\": 0, \"std\": 1, \"members\": {\"a b\": {\"mean\": 0, \"std\": 1}}}", "member name"),
            ("{\"mean\": 0, \"std\": 1, \"stdd\": 1}", "stdd"),
        ] {
            std::fs::write(&path, text).expect("written");
            let problem = read(&path).expect_err("invalid");
            assert!(problem.contains("calibration.json") && problem.contains(words), "{problem}");
        }
        assert!(numbers("it", &Moments::of([1.0, 1.0])).is_err());
        assert_eq!(numbers("it", &Moments::of([1.0, 3.0])), Ok((2.0, 1.0)));
    }
}
