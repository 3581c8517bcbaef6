//! What a hub says of a revision, and which of its files a reward model is made of. Pure.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::hub_path::is_segment;

/// A file to be had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RemoteFile {
    /// Inside the folder.
    pub name: String,
    pub bytes: u64,
    pub digest: Digest,
}

/// What the content must be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Digest {
    /// Of the content; large files have it.
    Sha256(String),
    /// SHA-1 over `blob`, the length and the content, as git names small files.
    GitBlob(String),
    /// A name of the version, from which nothing can be told of the content: of a file in a bucket without checksums.
    Version(String),
}

impl Digest {
    /// The name of the content in the cache.
    pub fn hex(&self) -> &str {
        match self {
            Self::Sha256(hex) | Self::GitBlob(hex) | Self::Version(hex) => hex,
        }
    }
}

/// A revision, as it was when the hub was asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Listing {
    pub commit: String,
    pub files: Vec<RemoteFile>,
}

#[derive(Deserialize)]
struct RawListing {
    sha: String,
    #[serde(default)]
    siblings: Vec<RawFile>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawFile {
    rfilename: String,
    size: Option<u64>,
    blob_id: Option<String>,
    lfs: Option<RawLfs>,
}

#[derive(Deserialize)]
struct RawLfs {
    sha256: String,
    size: u64,
}

/// Whether a file of this name is fetched: weights as safetensors, JSON, and what tokenizers are made of.
pub(super) fn is_wanted(name: &str) -> bool {
    let tokenizer = ["merges.txt", "vocab.txt", "tokenizer.model"].contains(&name);
    let kind = [".safetensors", ".json", ".jinja"].iter().any(|suffix| name.ends_with(suffix));
    // The same weights once more in another tool's layout.
    (tokenizer || kind) && !name.starts_with("consolidated")
}

/// The files of one folder that make a checkpoint.
pub(super) fn parse(json: &[u8], subdir: &str) -> Result<Listing, String> {
    let raw: RawListing = serde_json::from_slice(json).map_err(|error| format!("the hub's answer cannot be read: {error}"))?;
    if !is_hex(&raw.sha, 40) {
        return Err(format!("the hub names no commit but {:?}", raw.sha.chars().take(60).collect::<String>()));
    }
    let prefix = if subdir.is_empty() { String::new() } else { format!("{subdir}/") };
    let mut files = Vec::new();
    for file in raw.siblings {
        let Some(name) = file.rfilename.strip_prefix(&prefix).filter(|name| is_segment(name) && is_wanted(name)) else { continue };
        let git = || file.blob_id.clone().filter(|id| is_hex(id, 40)).map(Digest::GitBlob);
        let large = || file.lfs.as_ref().filter(|lfs| is_hex(&lfs.sha256, 64)).map(|lfs| Digest::Sha256(lfs.sha256.clone()));
        let bytes = file.lfs.as_ref().map(|lfs| lfs.size).or(file.size);
        match (large().or_else(git), bytes) {
            (Some(digest), Some(bytes)) => files.push(RemoteFile { name: name.to_owned(), bytes, digest }),
            _ => return Err(format!("the hub gives no size and checksum of {:?}", file.rfilename)),
        }
    }
    check(&files)?;
    Ok(Listing { commit: raw.sha, files })
}

/// The checksums of a list as sha256sum writes it, by name. What lies in folders within is passed over.
pub(super) fn checksums(text: &str) -> Result<BTreeMap<String, String>, String> {
    let mut sums = BTreeMap::new();
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let read = line.split_once(' ').and_then(|(sum, name)| {
            let name = name.strip_prefix(['*', ' ']).unwrap_or(name);
            let sum = sum.to_ascii_lowercase();
            is_hex(&sum, 64).then_some((name.strip_prefix("./").unwrap_or(name), sum))
        });
        let (name, sum) = read.ok_or_else(|| format!("line {}: expected a SHA-256 in hex and a name", number + 1))?;
        if is_segment(name) && sums.insert(name.to_owned(), sum).is_some() {
            return Err(format!("line {}: names {name} again", number + 1));
        }
    }
    Ok(sums)
}

/// Whether these are the files of a checkpoint that can be loaded.
pub(super) fn check(files: &[RemoteFile]) -> Result<(), String> {
    let has = |name: &str| files.iter().any(|file| file.name == name);
    if !has("config.json") && !has("adapter_config.json") {
        return Err("holds no config.json or adapter_config.json, so no checkpoint".to_owned());
    }
    if !files.iter().any(|file| file.name.ends_with(".safetensors")) {
        return Err("holds no safetensors; pickled weights are not loaded, because that runs code".to_owned());
    }
    Ok(())
}

pub(super) fn is_hex(text: &str, length: usize) -> bool {
    text.len() == length && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

    fn listing(names: &[&str], subdir: &str) -> Result<Vec<String>, String> {
        let file = |name: &&str| serde_json::json!({"rfilename": name, "size": 5, "blobId": COMMIT});
        let json = serde_json::json!({"sha": COMMIT, "siblings": names.iter().map(file).collect::<Vec<_>>()});
        let listing = parse(json.to_string().as_bytes(), subdir)?;
        assert_eq!(listing.commit, COMMIT);
        Ok(listing.files.into_iter().map(|file| file.name).collect())
    }

    #[test]
    fn only_what_a_model_is_made_of_is_fetched() {
        let all = [
            "config.json",
            "model.safetensors",
            "consolidated.safetensors",
            "pytorch_model.bin",
            "modeling_custom.py",
            "README.md",
            "tokenizer.json",
            "chat_template.jinja",
            "tokenizer.model",
            "optimizer.pt",
            "..json",
            "a/config.json",
            "a/model.safetensors",
        ];
        let own = listing(&all, "").expect("a checkpoint");
        assert_eq!(own, ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "tokenizer.model"]);
        assert_eq!(listing(&all, "a").expect("a checkpoint"), ["config.json", "model.safetensors"]);
    }

    #[test]
    fn an_adapter_is_fetched_as_a_checkpoint_is() {
        let all = ["README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "training_args.bin"];
        assert_eq!(listing(&all, "").expect("an adapter"), ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json"]);
    }

    #[test]
    fn what_is_no_checkpoint_says_so() {
        assert!(listing(&["config.json", "pytorch_model.bin"], "").expect_err("no weights").contains("safetensors"));
        assert!(listing(&["model.safetensors"], "").expect_err("no config").contains("config.json"));
        assert!(parse(b"{\"sha\": \"../..\"}", "").is_err());
    }

    #[test]
    fn checksums_are_read_as_sha256sum_writes_them() {
        let (one, two) = ("a".repeat(64), "B".repeat(64));
        let sums = checksums(&format!("{one}  config.json\n{two} *./model.safetensors\n\n{one}  step-1/config.json\n")).expect("a list");
        let expected = [("config.json", one.clone()), ("model.safetensors", "b".repeat(64))];
        assert_eq!(sums, expected.map(|(name, sum)| (name.to_owned(), sum)).into());
        for wrong in ["SHA256 (config.json) = aa", "config.json", one.as_str(), &format!("{one}  x\n{one}  x"), "<html> <body>"] {
            assert!(checksums(wrong).is_err(), "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn no_answer_makes_it_panic(json in "[ -~]{0,100}") {
            let _ = parse(json.as_bytes(), "");
        }

        #[test]
        fn no_list_of_checksums_makes_it_panic(text in "\\PC{0,100}") {
            let _ = checksums(&text);
        }
    }
}
