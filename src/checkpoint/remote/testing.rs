//! A server on this machine that answers as a test wants it to, and what a hub in good health answers. The tests of the
//! program read this file, too.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use ring::digest::{Algorithm, SHA1_FOR_LEGACY_USE_ONLY, SHA256, digest};

/// What every revision of every repository stands for.
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// One request, as the server sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct Asked {
    pub path: String,
    pub range: Option<(u64, u64)>,
    pub token: Option<String>,
}

/// An answer: status, headers, and a body that may be shorter than its announced length.
pub struct Answer {
    status: u16,
    headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    announced: usize,
}

impl Answer {
    pub fn new(status: u16, headers: &[(&str, &str)], body: &[u8]) -> Self {
        let headers = headers.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        Self { status, headers, body: body.to_vec(), announced: body.len() }
    }

    pub fn with(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    /// The connection ends after so many bytes of the body.
    pub fn broken_after(mut self, bytes: usize) -> Self {
        self.body.truncate(bytes);
        self
    }
}

pub type Handler = dyn Fn(&Asked) -> Answer + Send + Sync;

pub struct Server {
    pub address: String,
    asked: Arc<Mutex<Vec<Asked>>>,
}

impl Server {
    pub fn start(handler: Arc<Handler>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("free port");
        let address = listener.local_addr().expect("address").to_string();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let seen = asked.clone();
        // The threads end with the test's process.
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (handler, seen) = (handler.clone(), seen.clone());
                std::thread::spawn(move || serve(stream, handler.as_ref(), &seen));
            }
        });
        Self { address, asked }
    }

    pub fn asked(&self) -> Vec<Asked> {
        self.asked.lock().expect("no panic").clone()
    }

    pub fn downloads(&self) -> Vec<Asked> {
        self.asked().into_iter().filter(|asked| asked.path.contains("/resolve/")).collect()
    }
}

/// One request a connection.
fn serve(stream: TcpStream, handler: &Handler, seen: &Mutex<Vec<Asked>>) {
    let mut reader = BufReader::new(stream.try_clone().expect("a second handle"));
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).unwrap_or(0) == 0 {
            return;
        }
        if line.trim().is_empty() {
            break;
        }
        lines.push(line.trim().to_owned());
    }
    let header = |name: &str| {
        let found = lines.iter().filter_map(|line| line.split_once(':')).find(|(key, _)| key.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.trim().to_owned())
    };
    let range = header("range").and_then(|range| {
        let (begin, end) = range.strip_prefix("bytes=")?.split_once('-')?;
        Some((begin.parse().ok()?, end.parse().ok()?))
    });
    let path = lines[0].split(' ').nth(1).unwrap_or_default().to_owned();
    let asked = Asked { path, range, token: header("authorization") };
    seen.lock().expect("no panic").push(asked.clone());
    let answer = handler(&asked);
    let mut head = format!("HTTP/1.1 {} X\r\nconnection: close\r\ncontent-length: {}\r\n", answer.status, answer.announced);
    for (name, value) in &answer.headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    let mut stream = stream;
    // A client that has gone is what some tests are about.
    let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(b"\r\n")).and_then(|()| stream.write_all(&answer.body));
}

/// The range that was asked for.
pub fn part_of(bytes: &[u8], asked: &Asked) -> Answer {
    match asked.range {
        Some((begin, end)) => {
            let end = (end as usize).min(bytes.len() - 1);
            let range = format!("bytes {begin}-{end}/{}", bytes.len());
            Answer::new(206, &[("content-range", &range)], &bytes[begin as usize..=end])
        }
        None => Answer::new(200, &[], bytes),
    }
}

/// A repository of a hub: its name, as `org/name`, and its files by their paths.
#[derive(Clone)]
pub struct Repository {
    pub name: String,
    pub files: BTreeMap<String, Vec<u8>>,
}

impl Repository {
    fn listing(&self) -> Answer {
        let siblings = self.files.iter().map(|(name, bytes)| {
            let mut file = serde_json::json!({"rfilename": name, "size": bytes.len(), "blobId": git_blob(bytes)});
            if name.ends_with(".safetensors") {
                file["lfs"] = serde_json::json!({"sha256": sha256(bytes), "size": bytes.len(), "pointerSize": 134});
            }
            file
        });
        let json = serde_json::json!({"id": self.name, "sha": COMMIT, "siblings": siblings.collect::<Vec<_>>()});
        Answer::new(200, &[("content-type", "application/json")], json.to_string().as_bytes())
    }

    /// What a hub in good health answers.
    pub fn answer(&self, asked: &Asked) -> Answer {
        if asked.path.starts_with(&format!("/api/models/{}/revision/", self.name)) {
            return self.listing();
        }
        let name = asked.path.strip_prefix(&format!("/{}/resolve/{COMMIT}/", self.name)).unwrap_or_default();
        match self.files.get(name) {
            Some(bytes) => part_of(bytes, asked),
            None => Answer::new(404, &[], b"no such file"),
        }
    }
}

pub fn sha256(bytes: &[u8]) -> String {
    hex(&SHA256, bytes)
}

fn git_blob(bytes: &[u8]) -> String {
    hex(&SHA1_FOR_LEGACY_USE_ONLY, &[format!("blob {}\0", bytes.len()).as_bytes(), bytes].concat())
}

fn hex(algorithm: &'static Algorithm, bytes: &[u8]) -> String {
    digest(algorithm, bytes).as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}
