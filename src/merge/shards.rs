//! Which file holds which tensor of a checkpoint that is about to be written, and what its header says. Pure.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use crate::checkpoint::{Manifest, TensorInfo};

/// `__metadata__` of a safetensors file: text to text.
pub type Metadata = BTreeMap<String, String>;

/// One safetensors file, before it is written.
#[derive(Clone, Debug, PartialEq)]
pub struct Shard {
    pub file: String,
    /// In the order of their bytes.
    pub tensors: Vec<(String, TensorInfo)>,
}

/// Splits tensors over files of at most `max_bytes` bytes of data each; a tensor that is larger than that gets a file of
/// its own. Wide dtypes come first and then names, as the reference implementation orders them, so that every tensor is
/// aligned to its element.
pub fn split(manifest: &Manifest, max_bytes: u64) -> Vec<Shard> {
    let mut tensors: Vec<(String, TensorInfo)> = manifest.iter().map(|(name, info)| (name.to_owned(), info.clone())).collect();
    // The sort is stable, and a manifest is in name order already.
    tensors.sort_by_key(|(_, info)| std::cmp::Reverse(info.dtype.size()));
    let mut files: Vec<Vec<(String, TensorInfo)>> = vec![Vec::new()];
    let mut bytes = 0;
    for (name, info) in tensors {
        if bytes > 0 && bytes + info.bytes() > max_bytes {
            files.push(Vec::new());
            bytes = 0;
        }
        bytes += info.bytes();
        if let Some(file) = files.last_mut() {
            file.push((name, info));
        }
    }
    let count = files.len();
    let name = |place: usize| match count {
        1 => "model.safetensors".to_owned(),
        _ => format!("model-{:05}-of-{count:05}.safetensors", place + 1),
    };
    files.into_iter().enumerate().map(|(place, tensors)| Shard { file: name(place), tensors }).collect()
}

impl Shard {
    pub fn data_bytes(&self) -> u64 {
        self.tensors.iter().map(|(_, info)| info.bytes()).sum()
    }

    /// Everything before the tensors' bytes: eight bytes of length, then the JSON, padded with spaces to a multiple of
    /// eight and to at least `at_least` bytes in all.
    pub fn header(&self, metadata: &Metadata, at_least: usize) -> Vec<u8> {
        let mut json = Map::new();
        json.insert("__metadata__".to_owned(), json!(metadata));
        let mut begin = 0;
        for (name, info) in &self.tensors {
            let end = begin + info.bytes();
            let entry = json!({"dtype": info.dtype.safetensors_name(), "shape": info.shape, "data_offsets": [begin, end]});
            json.insert(name.clone(), entry);
            begin = end;
        }
        let mut text = Value::Object(json).to_string().into_bytes();
        let padded = text.len().max(at_least.saturating_sub(8)).next_multiple_of(8);
        text.resize(padded, b' ');
        let mut header = (padded as u64).to_le_bytes().to_vec();
        header.append(&mut text);
        header
    }
}

/// `model.safetensors.index.json`, which only a checkpoint of several files has.
pub fn index(shards: &[Shard]) -> Option<Value> {
    if shards.len() < 2 {
        return None;
    }
    let total: u64 = shards.iter().map(Shard::data_bytes).sum();
    let places = shards.iter().flat_map(|shard| shard.tensors.iter().map(|(name, _)| (name.clone(), json!(shard.file))));
    let places: BTreeMap<String, Value> = places.collect();
    Some(json!({"metadata": {"total_size": total}, "weight_map": places}))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Dtype;

    fn manifest(tensors: &[(&str, Dtype, usize)]) -> Manifest {
        let info = |&(name, dtype, elements): &(&str, Dtype, usize)| (name.to_owned(), TensorInfo { dtype, shape: vec![elements] });
        tensors.iter().map(info).collect()
    }

    fn names(shards: &[Shard]) -> Vec<Vec<&str>> {
        shards.iter().map(|shard| shard.tensors.iter().map(|(name, _)| name.as_str()).collect()).collect()
    }

    #[test]
    fn files_are_filled_in_order_up_to_the_limit() {
        let tensors = manifest(&[("a", Dtype::Bf16, 4), ("b", Dtype::Bf16, 4), ("c", Dtype::Bf16, 100), ("d", Dtype::Bf16, 1)]);
        assert_eq!(names(&split(&tensors, 16)), [vec!["a", "b"], vec!["c"], vec!["d"]]);
        assert_eq!(names(&split(&tensors, 15)), [vec!["a"], vec!["b"], vec!["c"], vec!["d"]]);
        let one = split(&tensors, 1 << 30);
        assert_eq!((one.len(), one[0].file.as_str(), one[0].data_bytes()), (1, "model.safetensors", 218));
        assert_eq!(index(&one), None);
        let several = split(&tensors, 16);
        assert_eq!(several[2].file, "model-00003-of-00003.safetensors");
        let index = index(&several).expect("an index");
        assert_eq!(index["metadata"]["total_size"], 218);
        assert_eq!(index["weight_map"]["c"], "model-00002-of-00003.safetensors");
        assert_eq!(split(&Manifest::default(), 5).len(), 1, "a checkpoint without tensors still is a file");
    }

    #[test]
    fn wide_elements_come_first_so_that_all_are_aligned() {
        let tensors = manifest(&[("a", Dtype::U8, 3), ("b", Dtype::Bf16, 3), ("c", Dtype::F32, 3), ("d", Dtype::I64, 1)]);
        assert_eq!(names(&split(&tensors, 1000)), [vec!["d", "c", "b", "a"]]);
    }

    #[test]
    fn a_header_keeps_its_length_when_room_was_reserved() {
        let shard = &split(&manifest(&[("a", Dtype::F32, 2)]), 1000)[0];
        let draft = shard.header(&Metadata::from([("key".to_owned(), "0".repeat(64))]), 0);
        let last = shard.header(&Metadata::from([("key".to_owned(), "short".to_owned())]), draft.len());
        assert_eq!(draft.len(), last.len());
        assert!(last.len().is_multiple_of(8));
        assert_eq!(u64::from_le_bytes(last[..8].try_into().expect("eight bytes")) as usize, last.len() - 8);
        let json: Value = serde_json::from_slice(&last[8..]).expect("JSON");
        assert_eq!(json["a"], json!({"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}));
        assert_eq!(json["__metadata__"]["key"], "short");
    }
}
