use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

/// Parses the bytes of a whole file, as the reader does.
fn parse(file: &[u8]) -> Result<Header, String> {
    let first = file.first_chunk().ok_or("shorter than 8 bytes")?;
    let header = header_bytes(*first, file.len() as u64)?;
    parse_header(&file[8..8 + header], (file.len() - 8 - header) as u64)
}

/// The bytes of a file with this header text and so many bytes of data.
fn file(header: &str, data_bytes: usize) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.resize(file.len() + data_bytes, 0);
    file
}

fn problem(header: &Value, data_bytes: usize) -> String {
    parse(&file(&header.to_string(), data_bytes)).unwrap_err()
}

#[test]
fn a_header_gives_names_dtypes_shapes_places_and_metadata() {
    let header = json!({
        "__metadata__": {"format": "pt"},
        "b": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]},
        "a": {"dtype": "F32", "shape": [], "data_offsets": [12, 16]},
        "none": {"dtype": "I64", "shape": [0, 7], "data_offsets": [16, 16]},
    });
    let parsed = parse(&file(&format!("{header}   "), 16)).unwrap();
    assert_eq!(parsed.metadata, BTreeMap::from([("format".to_owned(), "pt".to_owned())]));
    let places: Vec<_> = parsed.tensors.iter().map(|(name, entry)| (name.as_str(), entry.info.to_string(), entry.begin)).collect();
    assert_eq!(places, [("a", "F32 []".to_owned(), 12), ("b", "BF16 [2, 3]".to_owned(), 0), ("none", "I64 [0, 7]".to_owned(), 16)]);
}

#[test]
fn a_header_that_lies_is_refused_with_the_reason() {
    let one = |dtype: &str, shape: Value, offsets: Value| json!({"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets}});
    let cases = [
        (
            one("F8_E4M3", json!([4]), json!([0, 4])),
            4,
            "tensor \"w\": dtype \"F8_E4M3\" is not supported (FP8 and other quantised weights are not done",
        ),
        (one("F32", json!([2]), json!([0, 4])), 4, "hold 4 bytes, but shape [2] of F32 takes 8"),
        (one("F32", json!([2]), json!([8, 0])), 8, "data_offsets [8, 0] lie outside"),
        (one("F32", json!([2]), json!([0, 8])), 4, "data_offsets [0, 8] lie outside of the file's 4 bytes"),
        (one("F32", json!([1]), json!([0, 4])), 8, "end at byte 4 of the data, but the file holds 8"),
        (one("F32", json!([1]), json!([4, 8])), 8, "leaves a hole before it: it begins at 4, expected 0"),
        (one("F32", json!([u64::MAX, 2]), json!([0, 4])), 4, "overflows"),
        (one("F32", json!([1_u64 << 62, 4]), json!([0, 0])), 0, "overflows"),
        (one("F32", json!([u64::MAX, u64::MAX, 0]), json!([0, 0])), 0, "overflows"),
        (one("F32", json!([-1]), json!([0, 4])), 4, "invalid value: integer `-1`"),
        (one("F32", json!([1.5]), json!([0, 4])), 4, "invalid type: floating point"),
        (one("F32", json!(vec![1; 17]), json!([0, 4])), 4, "more than 16 dimensions"),
        (one("F32", json!([1]), json!([0])), 4, "invalid length 1"),
        (json!({"w": {"dtype": "F32", "shape": [1]}}), 4, "missing field `data_offsets`"),
        (json!({"w": 7}), 4, "invalid type: integer `7`"),
        (json!({"__metadata__": {"a": 1}}), 0, "expected a string"),
        (json!({"__metadata__": []}), 0, "expected an object"),
        (json!([]), 0, "does not begin with '{'"),
    ];
    for (header, data_bytes, expected) in cases {
        let problem = problem(&header, data_bytes);
        assert!(problem.contains(expected), "{header}: {problem:?} should say {expected:?}");
    }
}

#[test]
fn two_tensors_in_one_place_are_refused() {
    let tensor = |begin: u64, end: u64| json!({"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]});
    assert!(problem(&json!({"a": tensor(0, 4), "b": tensor(2, 6)}), 6).contains("tensor \"b\" overlaps the tensor before it"));
    assert!(problem(&json!({"a": tensor(0, 4), "b": tensor(0, 4)}), 4).contains("overlaps"));
}

#[test]
fn a_name_that_stands_twice_is_refused() {
    let tensor = r#"{"dtype":"U8","shape":[1],"data_offsets":[0,1]}"#;
    let empty = r#"{"dtype":"U8","shape":[0],"data_offsets":[0,0]}"#;
    for header in [
        format!(r#"{{"a":{tensor},"a":{empty}}}"#),
        format!(r#"{{"a":{tensor},"\u0061":{empty}}}"#),
        format!(r#"{{"__metadata__":{{}},"__metadata__":{{}},"a":{tensor}}}"#),
        format!(r#"{{"__metadata__":{{"k":"1","k":"2"}},"a":{tensor}}}"#),
    ] {
        assert!(parse(&file(&header, 1)).unwrap_err().contains("stands there twice"), "{header}");
    }
    let field = r#"{"a":{"dtype":"U8","shape":[1],"shape":[1],"data_offsets":[0,1]}}"#;
    assert!(parse(&file(field, 1)).unwrap_err().contains("duplicate field"));
}

#[test]
fn a_header_longer_than_the_file_or_the_limit_is_refused_before_anything_is_read() {
    assert!(header_bytes(9_u64.to_le_bytes(), 16).unwrap_err().contains("claims 9 bytes, but only 8 follow"));
    assert!(header_bytes(u64::MAX.to_le_bytes(), u64::MAX).unwrap_err().contains("expected at most 100000000"));
    assert_eq!(header_bytes(8_u64.to_le_bytes(), 16), Ok(8));
}

#[test]
fn broken_utf8_is_refused_at_its_byte() {
    let mut broken = file(r#"{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#, 0);
    broken[8 + 2] = 0xff;
    assert_eq!(parse(&broken).unwrap_err(), "its header is not UTF-8 at byte 2");
}

#[test]
fn an_index_cannot_lead_out_of_its_folder() {
    for name in
        ["../a.safetensors", "/a.safetensors", "b/a.safetensors", "..", ".", "", "b\\a.safetensors", "C:a.safetensors", "a\0.safetensors"]
    {
        let problem = parse_index(json!({"weight_map": {"w": name}}).to_string().as_bytes()).unwrap_err();
        assert!(problem.contains("expected the name of a file in the same folder"), "{name}: {problem}");
    }
    assert!(parse_index(br#"{"weight_map":{"w":"pytorch_model.bin"}}"#).unwrap_err().contains("expected a .safetensors file"));
    assert!(parse_index(br#"{"weight_map":{}}"#).unwrap_err().contains("empty"));
    assert!(parse_index(br#"{"weight_map":{"w":"a.safetensors","w":"b.safetensors"}}"#).unwrap_err().contains("twice"));
    assert!(parse_index(br#"{"metadata":{}}"#).unwrap_err().contains("missing field `weight_map`"));
    assert!(parse_index(b"\xff").is_err());
    let index = parse_index(br#"{"metadata":{"total_size":1},"weight_map":{"w":"a.safetensors"}}"#).unwrap();
    assert_eq!(index, BTreeMap::from([("w".to_owned(), "a.safetensors".to_owned())]));
}

#[test]
fn index_and_shards_must_name_the_same_tensors() {
    let header = |names: &[&str]| {
        let entry = |name: &&str| {
            let info = TensorInfo { dtype: Dtype::U8, shape: vec![0] };
            ((*name).to_owned(), Entry { info, begin: 0 })
        };
        Header { tensors: names.iter().map(entry).collect(), ..Header::default() }
    };
    let index = |places: &[(&str, &str)]| places.iter().map(|&(name, file)| (name.to_owned(), file.to_owned())).collect();
    let shards = BTreeMap::from([("1".to_owned(), header(&["a"])), ("2".to_owned(), header(&["b"]))]);
    assert_eq!(unify(&index(&[("a", "1"), ("b", "2")]), &shards), Ok(()));
    assert!(unify(&index(&[("a", "1"), ("b", "1")]), &shards).unwrap_err().contains("\"b\" in \"1\", which does not hold it"));
    assert!(unify(&index(&[("a", "1"), ("b", "3")]), &shards).unwrap_err().contains("\"3\", which is not there"));
    assert!(unify(&index(&[("a", "1")]), &shards).unwrap_err().contains("\"2\" holds tensor \"b\", which weight_map does not place there"));
}

/// Tensors of any dtype and small shapes, laid out in order.
fn headers() -> impl Strategy<Value = (Value, usize)> {
    let dtypes = prop::sample::select(vec!["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"]);
    let tensors = prop::collection::btree_map("[a-z.]{1,12}", (dtypes, prop::collection::vec(0_usize..5, 0..4)), 1..8);
    tensors.prop_map(|tensors| {
        let (mut header, mut end) = (serde_json::Map::new(), 0);
        for (name, (dtype, shape)) in tensors {
            let begin = end;
            end += shape.iter().product::<usize>() * Dtype::from_safetensors_name(dtype).unwrap().size();
            header.insert(name, json!({"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}));
        }
        (Value::Object(header), end)
    })
}

proptest! {
    #[test]
    fn any_bytes_give_an_answer(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = parse(&bytes);
        let _ = parse_index(&bytes);
        let _ = parse_header(&bytes, 100);
    }

    #[test]
    fn any_change_of_a_byte_gives_an_answer((header, data) in headers(), at in any::<prop::sample::Index>(), byte: u8) {
        let mut file = file(&header.to_string(), data);
        let at = at.index(file.len());
        file[at] = byte;
        if let Ok(parsed) = parse(&file) {
            let total: u64 = parsed.tensors.values().map(|entry| entry.info.bytes()).sum();
            prop_assert!(total <= file.len() as u64);
        }
    }

    #[test]
    fn what_was_written_is_read((header, data) in headers()) {
        let parsed = parse(&file(&header.to_string(), data)).unwrap();
        prop_assert_eq!(parsed.tensors.len(), header.as_object().unwrap().len());
        for (name, entry) in &parsed.tensors {
            let written = &header[name];
            prop_assert_eq!(&json!(entry.info.dtype.safetensors_name()), &written["dtype"]);
            prop_assert_eq!(&json!(entry.info.shape), &written["shape"]);
            prop_assert_eq!(&json!([entry.begin, entry.begin + entry.info.bytes()]), &written["data_offsets"]);
        }
    }

    #[test]
    fn every_wrong_number_is_an_error((header, data) in headers(), which in any::<prop::sample::Index>(), wrong in any::<u64>(), far: bool) {
        let names: Vec<String> = header.as_object().unwrap().keys().cloned().collect();
        let name = which.get(&names);
        let wrong = if far { wrong } else { wrong % 64 };
        for place in ["/data_offsets/0", "/data_offsets/1", "/shape/0"] {
            let mut changed = header.clone();
            let Some(number) = changed[name].pointer_mut(place) else { continue };
            let before = number.as_u64().unwrap();
            *number = json!(wrong);
            // In a tensor without elements another dimension changes nothing that could be wrong.
            let empty = header[name]["data_offsets"][0] == header[name]["data_offsets"][1];
            if wrong == before || (empty && place == "/shape/0") {
                continue;
            }
            prop_assert!(parse(&file(&changed.to_string(), data)).is_err(), "{} {} {}", name, place, wrong);
        }
        prop_assert!(parse(&file(&header.to_string(), data + 1)).is_err());
        if data > 0 {
            prop_assert!(parse(&file(&header.to_string(), data - 1)).is_err());
        }
    }
}
