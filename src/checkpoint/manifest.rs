//! Names, dtypes, shapes and places of a checkpoint's tensors, from the headers of its files. Pure: bytes in, facts out,
//! and every number is checked before it is used, because a header may be cut short, wrong or hostile.
//!
//! The safetensors format: eight bytes of little-endian header length, a JSON object, then the tensors' bytes. The object
//! maps each name to `{"dtype", "shape", "data_offsets": [begin, end]}`, offsets counted from the end of the header.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};

use super::Dtype;

/// The longest header that is read, as in the reference implementation of the format.
pub const MAX_HEADER_BYTES: u64 = 100_000_000;

/// More dimensions than any model has; a bound on what a header can make us store.
const MAX_RANK: usize = 16;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
}

impl TensorInfo {
    /// The number of elements; the manifest's parser has checked that the product does not overflow.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Bytes of all elements in their stored form; checked by the parser like [`TensorInfo::elements`].
    pub fn bytes(&self) -> u64 {
        self.elements() as u64 * self.dtype.size() as u64
    }
}

impl fmt::Display for TensorInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:?}", self.dtype, self.shape)
    }
}

/// All tensors of a source, in name order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Manifest {
    tensors: BTreeMap<String, TensorInfo>,
}

impl Manifest {
    pub fn get(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name)
    }

    /// With the name as it lives here.
    pub fn get_key_value(&self, name: &str) -> Option<(&str, &TensorInfo)> {
        self.tensors.get_key_value(name).map(|(name, info)| (name.as_str(), info))
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, &TensorInfo)> {
        self.tensors.iter().map(|(name, info)| (name.as_str(), info))
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }
}

impl FromIterator<(String, TensorInfo)> for Manifest {
    fn from_iter<T: IntoIterator<Item = (String, TensorInfo)>>(tensors: T) -> Self {
        Self { tensors: tensors.into_iter().collect() }
    }
}

/// One tensor of a safetensors file: what it is and where its bytes begin, counted from the end of the header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub info: TensorInfo,
    pub begin: u64,
}

/// A checked safetensors header: the tensors fill the data section exactly, without overlap or hole.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Header {
    pub tensors: BTreeMap<String, Entry>,
    /// `__metadata__`.
    pub metadata: BTreeMap<String, String>,
}

/// Bytes of the header's JSON, from the first eight bytes of a file of `file_bytes` bytes.
pub fn header_bytes(first: [u8; 8], file_bytes: u64) -> Result<usize, String> {
    let claimed = u64::from_le_bytes(first);
    if claimed > MAX_HEADER_BYTES {
        return Err(format!("its header claims {claimed} bytes, expected at most {MAX_HEADER_BYTES}; this is no safetensors file"));
    }
    let left = file_bytes.saturating_sub(8);
    if claimed > left {
        return Err(format!("its header claims {claimed} bytes, but only {left} follow; the file was cut short"));
    }
    usize::try_from(claimed).map_err(|_| format!("its header of {claimed} bytes does not fit into memory"))
}

/// Parses a header's JSON for a file whose data section has `data_bytes` bytes.
pub fn parse_header(json: &[u8], data_bytes: u64) -> Result<Header, String> {
    let text = std::str::from_utf8(json).map_err(|error| format!("its header is not UTF-8 at byte {}", error.valid_up_to()))?;
    if !text.starts_with('{') {
        return Err("its header does not begin with '{'; this is no safetensors file".to_owned());
    }
    let raw: RawHeader = serde_json::from_str(text).map_err(|error| format!("its header cannot be read: {error}"))?;
    let mut tensors = BTreeMap::new();
    let mut spans = Vec::with_capacity(raw.tensors.len());
    for (name, raw) in raw.tensors {
        let entry = check_entry(&raw, data_bytes).map_err(|problem| format!("tensor {name:?}: {problem}"))?;
        spans.push((raw.data_offsets.0, raw.data_offsets.1, name.clone()));
        tensors.insert(name, entry);
    }
    spans.sort_unstable();
    let mut end_before = 0;
    for (begin, end, name) in spans {
        if begin != end_before {
            let what = if begin < end_before { "overlaps the tensor before it" } else { "leaves a hole before it" };
            return Err(format!("tensor {name:?} {what}: it begins at {begin}, expected {end_before}"));
        }
        end_before = end;
    }
    if end_before != data_bytes {
        return Err(format!("its tensors end at byte {end_before} of the data, but the file holds {data_bytes} bytes of data"));
    }
    Ok(Header { tensors, metadata: raw.metadata })
}

fn check_entry(raw: &RawEntry, data_bytes: u64) -> Result<Entry, String> {
    let dtype = Dtype::from_safetensors_name(&raw.dtype).ok_or_else(|| {
        let narrow = if raw.dtype.starts_with("F8") || raw.dtype.starts_with("F4") {
            " (FP8 and other quantised weights are not done: take the checkpoint that these were made from)"
        } else {
            ""
        };
        format!("dtype {:?} is not supported{narrow}, expected one of F64, F32, F16, BF16, I64, I32, I16, I8, U8, BOOL", raw.dtype)
    })?;
    let shape = &raw.shape.0;
    let bytes = shape
        .iter()
        .try_fold(dtype.size(), |product, &dimension| product.checked_mul(usize::try_from(dimension).ok()?))
        // A zero anywhere makes the product small, but the other dimensions must still multiply without overflow,
        // because whoever takes a part of the shape multiplies them.
        .filter(|_| shape.iter().filter(|&&dimension| dimension > 0).try_fold(8_u64, |p, &d| p.checked_mul(d)).is_some())
        .ok_or_else(|| format!("shape {shape:?} of {dtype} overflows"))? as u64;
    let (begin, end) = raw.data_offsets;
    if begin > end || end > data_bytes {
        return Err(format!("data_offsets [{begin}, {end}] lie outside of the file's {data_bytes} bytes of data"));
    }
    if end - begin != bytes {
        return Err(format!("data_offsets [{begin}, {end}] hold {} bytes, but shape {shape:?} of {dtype} takes {bytes}", end - begin));
    }
    Ok(Entry { info: TensorInfo { dtype, shape: shape.iter().map(|&dimension| dimension as usize).collect() }, begin })
}

/// Parses `model.safetensors.index.json` to tensor name -> file name. A file name is a plain name: an index cannot lead
/// out of its folder.
pub fn parse_index(json: &[u8]) -> Result<BTreeMap<String, String>, String> {
    let raw: RawIndex = serde_json::from_slice(json).map_err(|error| format!("cannot be read: {error}"))?;
    if raw.weight_map.0.is_empty() {
        return Err("weight_map is empty".to_owned());
    }
    for (tensor, file) in &raw.weight_map.0 {
        let plain = !file.is_empty() && !file.starts_with('.') && !file.contains(['/', '\\', ':', '\0']);
        if !plain {
            return Err(format!("weight_map places tensor {tensor:?} in {file:?}, expected the name of a file in the same folder"));
        }
        if !file.ends_with(".safetensors") {
            return Err(format!("weight_map places tensor {tensor:?} in {file:?}, expected a .safetensors file"));
        }
    }
    Ok(raw.weight_map.0)
}

/// Brings the headers of all shards together under the index: both must name exactly the same tensors.
pub fn unify(index: &BTreeMap<String, String>, shards: &BTreeMap<String, Header>) -> Result<(), String> {
    for (tensor, file) in index {
        match shards.get(file) {
            None => return Err(format!("weight_map places tensor {tensor:?} in {file:?}, which is not there")),
            Some(header) if !header.tensors.contains_key(tensor) => {
                return Err(format!("weight_map places tensor {tensor:?} in {file:?}, which does not hold it"));
            }
            Some(_) => {}
        }
    }
    for (file, header) in shards {
        for tensor in header.tensors.keys() {
            if index.get(tensor) != Some(file) {
                return Err(format!("{file:?} holds tensor {tensor:?}, which weight_map does not place there"));
            }
        }
    }
    Ok(())
}

#[derive(serde::Deserialize)]
struct RawEntry {
    dtype: String,
    shape: Shape,
    data_offsets: (u64, u64),
}

#[derive(serde::Deserialize)]
struct RawIndex {
    weight_map: UniqueMap<String>,
}

struct RawHeader {
    tensors: BTreeMap<String, RawEntry>,
    metadata: BTreeMap<String, String>,
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct HeaderVisitor;
        impl<'de> Visitor<'de> for HeaderVisitor {
            type Value = RawHeader;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let (mut tensors, mut metadata) = (BTreeMap::new(), None);
                while let Some(name) = map.next_key::<String>()? {
                    let duplicate = if name == "__metadata__" {
                        metadata.replace(map.next_value::<UniqueMap<String>>()?.0).is_some()
                    } else {
                        tensors.insert(name.clone(), map.next_value::<RawEntry>()?).is_some()
                    };
                    if duplicate {
                        return Err(A::Error::custom(format_args!("{name:?} stands there twice")));
                    }
                }
                Ok(RawHeader { tensors, metadata: metadata.unwrap_or_default() })
            }
        }
        deserializer.deserialize_map(HeaderVisitor)
    }
}

/// A JSON object in which no key stands twice; serde_json would silently keep the last.
struct UniqueMap<V>(BTreeMap<String, V>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for UniqueMap<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct UniqueVisitor<V>(PhantomData<V>);
        impl<'de, V: Deserialize<'de>> Visitor<'de> for UniqueVisitor<V> {
            type Value = UniqueMap<V>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<UniqueMap<V>, A::Error> {
                let mut unique = BTreeMap::new();
                while let Some(key) = map.next_key::<String>()? {
                    if unique.insert(key.clone(), map.next_value()?).is_some() {
                        return Err(A::Error::custom(format_args!("{key:?} stands there twice")));
                    }
                }
                Ok(UniqueMap(unique))
            }
        }
        deserializer.deserialize_map(UniqueVisitor(PhantomData))
    }
}

/// A shape of at most [`MAX_RANK`] dimensions.
struct Shape(Vec<u64>);

impl<'de> Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ShapeVisitor;
        impl<'de> Visitor<'de> for ShapeVisitor {
            type Value = Shape;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a list of at most {MAX_RANK} dimensions")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Shape, A::Error> {
                let mut shape = Vec::new();
                while let Some(dimension) = list.next_element()? {
                    if shape.len() == MAX_RANK {
                        return Err(A::Error::custom(format_args!("a shape has more than {MAX_RANK} dimensions")));
                    }
                    shape.push(dimension);
                }
                Ok(Shape(shape))
            }
        }
        deserializer.deserialize_seq(ShapeVisitor)
    }
}

#[cfg(test)]
#[path = "manifest_tests.rs"]
mod tests;
