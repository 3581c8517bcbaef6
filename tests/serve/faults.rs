//! Checkpoints that are broken in every way that files can be: none is served, and the reason names the file.

use std::path::{Path, PathBuf};

use warm::app::{App, load_spec, loader};
use warm::clock::Clock;
use warm::config::{Resolved, Sources};

/// A copy of one member that may be broken.
fn copy(into: &Path, member: &Path) -> PathBuf {
    let folder = into.join(member.file_name().expect("a name"));
    std::fs::create_dir_all(&folder).expect("a folder");
    for entry in std::fs::read_dir(member).expect("a member").flatten() {
        std::fs::copy(entry.path(), folder.join(entry.file_name())).expect("copied");
    }
    folder
}

/// Why two members, the second of them broken, are not served.
fn refusal(damage: impl FnOnce(&Path)) -> String {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let members = super::members();
    let broken = copy(dir.path(), &members[1]);
    damage(&broken);
    let folders = vec![members[0].clone(), broken];
    let config = Resolved::new(Sources { folders, ..Sources::default() }).expect("settings").config;
    let app = App::new(&config, Clock::system(), "test".to_owned()).expect("app");
    let load = loader(load_spec(&config).expect("recipe"), Clock::system());
    let error = app.load(load, &mut |_| {}).expect_err("a broken member").to_string();
    assert!(app.engine().registry().current().is_none(), "nothing is live");
    error
}

fn change(path: PathBuf, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = std::fs::read(&path).expect("readable");
    change(&mut bytes);
    std::fs::write(path, bytes).expect("writable");
}

/// Where the data of a safetensors file begins.
fn data_begin(bytes: &[u8]) -> usize {
    8 + u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize
}

#[test]
fn a_truncated_file_is_refused_by_its_name() {
    let error = refusal(|folder| change(folder.join("model.safetensors"), |bytes| bytes.truncate(bytes.len() - 100)));
    assert!(error.contains("member-1") && error.contains("model.safetensors"), "{error}");
}

#[test]
fn a_header_that_lies_about_its_size_is_refused_before_memory_is_taken() {
    for lie in [u64::MAX, 1 << 40, 3] {
        let error = refusal(|folder| change(folder.join("model.safetensors"), |bytes| bytes[..8].copy_from_slice(&lie.to_le_bytes())));
        assert!(error.contains("member-1") && error.contains("model.safetensors"), "{lie}: {error}");
    }
}

#[test]
fn a_shape_that_does_not_fit_its_bytes_is_refused() {
    let error = refusal(|folder| {
        change(folder.join("model.safetensors"), |bytes| {
            let end = data_begin(bytes);
            let header = String::from_utf8(bytes[8..end].to_vec()).expect("JSON");
            let lie = header.replacen("\"shape\":[", "\"shape\":[9,", 1);
            let mut file = (lie.len() as u64).to_le_bytes().to_vec();
            file.extend(lie.as_bytes());
            file.extend(&bytes[end..]);
            *bytes = file;
        });
    });
    assert!(error.contains("model.safetensors"), "{error}");
}

#[test]
fn a_weight_that_is_nan_is_refused_by_tensor_and_place() {
    let error = refusal(|folder| {
        change(folder.join("model.safetensors"), |bytes| {
            let begin = data_begin(bytes);
            bytes[begin..begin + 4].copy_from_slice(&f32::NAN.to_le_bytes());
        });
    });
    assert!(error.contains("member-1") && error.contains("NaN") && error.contains("tensor"), "{error}");
}

#[test]
fn broken_utf8_is_refused_in_whichever_file_it_stands() {
    for file in ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"] {
        let error = refusal(|folder| {
            let path = folder.join(file);
            change(path, |bytes| {
                let middle = bytes.len() / 2;
                bytes[middle] = 0xff;
            });
        });
        assert!(error.contains("member-1") && error.contains(file), "{file}: {error}");
    }
}

#[test]
fn a_missing_head_another_shape_and_another_tokenizer_are_refused() {
    let headless = refusal(|folder| {
        change(folder.join("model.safetensors"), |bytes| {
            let end = data_begin(bytes);
            let renamed = String::from_utf8(bytes[8..end].to_vec()).expect("JSON").replace("score.weight", "other.weight");
            bytes.splice(8..end, renamed.into_bytes());
        });
    });
    assert!(headless.contains("score.weight") && headless.contains("never initialised at random"), "{headless}");
    let config = |from: &str, to: &str| {
        let (from, to) = (from.to_owned(), to.to_owned());
        refusal(move |folder| {
            change(folder.join("config.json"), |bytes| {
                let text = String::from_utf8(bytes.clone()).expect("JSON");
                assert!(text.contains(&from), "{text}");
                *bytes = text.replace(&from, &to).into_bytes();
            });
        })
    };
    let wider = config("\"intermediate_size\": 96", "\"intermediate_size\": 128");
    assert!(wider.contains("intermediate_size: expected 96, found 128"), "{wider}");
    let pad = config("\"pad_token_id\": 0", "\"pad_token_id\": 1");
    assert!(pad.contains("pad_token_id"), "{pad}");
    let template = refusal(|folder| std::fs::write(folder.join("chat_template.jinja"), "{{ messages[0]['content'] }}").expect("written"));
    assert!(template.contains("chat template"), "{template}");
}

#[test]
fn pickled_weights_are_refused_with_the_way_to_convert_them() {
    let error = refusal(|folder| {
        std::fs::rename(folder.join("model.safetensors"), folder.join("pytorch_model.bin")).expect("renamed");
    });
    assert!(error.contains("pytorch_model.bin") && error.contains("save_pretrained"), "{error}");
}
