//! A small HTTP server on loopback whose answers a test decides, cut connections among them.
use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex},
    thread,
};

use super::Content;

#[derive(Debug, Clone)]
pub struct Request {
    pub path: String,
    pub headers: BTreeMap<String, String>,
}

#[derive(Debug, Clone)]
pub struct Response {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    /// Send only so many bytes of the body, then close.
    pub cut: Option<usize>,
}

impl Response {
    pub fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Self { status, headers: Vec::new(), body: body.into(), cut: None }
    }

    pub fn header(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.to_owned(), value.into()));
        self
    }
}

/// The server; its thread ends with the test process.
pub struct Server {
    pub host: String,
    log: Arc<Mutex<Vec<Request>>>,
}

impl Server {
    pub fn new(answer: impl Fn(&Request) -> Response + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let log: Arc<Mutex<Vec<Request>>> = Arc::default();
        let (requests, answer) = (Arc::clone(&log), Arc::new(answer));
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (requests, answer) = (Arc::clone(&requests), Arc::clone(&answer));
                thread::spawn(move || serve(stream.unwrap(), &requests, &*answer));
            }
        });
        Self { host, log }
    }

    /// A registry with one image under any repository and tag, whose answers `change` may alter.
    pub fn registry(
        image: Content,
        change: impl Fn(&Request, Response) -> Response + Send + Sync + 'static,
    ) -> Self {
        Self::new(move |request| change(request, registry(&image, request)))
    }

    /// The requests so far whose path contains `part`.
    pub fn requests(&self, part: &str) -> Vec<Request> {
        self.log.lock().unwrap().iter().filter(|request| request.path.contains(part)).cloned().collect()
    }
}

/// What an honest registry answers.
pub fn registry(image: &Content, request: &Request) -> Response {
    let name = request.path.rsplit('/').next().unwrap();
    if request.path.contains("/manifests/") {
        let body = if name.contains(':') { image.blobs.get(name) } else { Some(&image.manifest) };
        return body.map_or(Response::new(404, "no such manifest"), |body| Response::new(200, body.clone()));
    }
    let Some(blob) = image.blobs.get(name) else { return Response::new(404, "no such blob") };
    let range = request
        .headers
        .get("range")
        .and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse::<usize>().ok());
    match range {
        Some(start) if start < blob.len() => Response::new(206, &blob[start..])
            .header("content-range", format!("bytes {start}-{}/{}", blob.len() - 1, blob.len())),
        Some(_) => Response::new(416, ""),
        None => Response::new(200, blob.clone()),
    }
}

fn serve(stream: TcpStream, log: &Mutex<Vec<Request>>, answer: &dyn Fn(&Request) -> Response) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut line = String::new();
    if reader.read_line(&mut line).unwrap_or(0) == 0 {
        return;
    }
    let path = line.split(' ').nth(1).unwrap().to_owned();
    let mut headers = BTreeMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        let Some((name, value)) = line.trim_end().split_once(": ") else { break };
        headers.insert(name.to_ascii_lowercase(), value.to_owned());
    }
    let request = Request { path, headers };
    log.lock().unwrap().push(request.clone());
    let response = answer(&request);
    let mut head = format!(
        "HTTP/1.1 {} X\r\nconnection: close\r\ncontent-length: {}\r\n",
        response.status,
        response.body.len()
    );
    for (name, value) in &response.headers {
        head += &format!("{name}: {value}\r\n");
    }
    let mut stream = stream;
    let body = &response.body[..response.cut.unwrap_or(response.body.len()).min(response.body.len())];
    // The client may have hung up.
    let _ = stream
        .write_all(head.as_bytes())
        .and_then(|()| stream.write_all(b"\r\n"))
        .and_then(|()| stream.write_all(body));
}
