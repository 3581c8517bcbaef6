use std::path::PathBuf;

use super::*;
use crate::checkpoint::fixture::{self, TINY};
use crate::merge::Recipe;

#[test]
fn smoke() {
    let dir = tempfile::tempdir().unwrap();
    let paths: Vec<PathBuf> = (0..3).map(|i| dir.path().join(format!("rm-{i}"))).collect();
    for (i, path) in paths.iter().enumerate() {
        fixture::write(path, &fixture::config(TINY), &fixture::llama(TINY, "BF16", i as u64), i + 1).unwrap();
    }
    let plan = Arc::new(MergePlan::open(&Recipe::uniform(&paths).unwrap()).unwrap());
    println!("{plan}");
    let merged = Merged::new(plan);
    let mut into = Elements::default();
    for (name, info) in merged.manifest().iter() {
        merged.read(name, 0..info.elements(), &mut into).unwrap();
    }
    println!("{} {into:?}", merged.weights_id().unwrap());
    println!("{}", merged.plan().recipe().to_resolved_string());
}
