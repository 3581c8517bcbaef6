//! Names, dtypes and shapes of a checkpoint's tensors.

use std::collections::BTreeMap;

use super::Dtype;

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
