//! Pulls from registries: a small server of our own that cuts connections and asks for logins, and Debian's
//! `docker-registry`, filled by skopeo.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]
mod support;

use std::{
    fs,
    io::{BufRead, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use base64::{Engine, engine::general_purpose::STANDARD};
use cubby_image::{Credentials, Digest, Error, Progress, PullOptions, PullPolicy, Reference};
use support::{
    Bench, Compression, Content,
    erofs::Erofs,
    fsck,
    http::{Request, Response, Server},
    run,
    tar::{archive, dir, file},
    wait,
};

fn noise(size: usize) -> Vec<u8> {
    let mut state = 88_172_645_463_325_252_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[0]
    };
    (0..size).map(|_| next()).collect()
}

fn layers() -> Vec<Vec<u8>> {
    vec![
        archive(&[dir("."), file("base", noise(300_000))]),
        archive(&[file("middle", noise(1000))]),
        archive(&[file("top", "top"), file("middle", "changed")]),
    ]
}

fn image() -> Content {
    Content::new(&layers(), Compression::Gzip)
}

/// The digest of the largest blob.
fn largest(image: &Content) -> (String, usize) {
    let (digest, blob) = image.blobs.iter().max_by_key(|(_, blob)| blob.len()).unwrap();
    (digest.clone(), blob.len())
}

fn assert_converted(image: &cubby_image::Image) {
    fsck(image);
    let files = Erofs::open(&image.disk).read();
    assert_eq!(files[&b"/middle"[..]].content, b"changed");
    assert!(files[&b"/base"[..]].content == noise(300_000));
    assert_eq!(image.config.cmd, ["/bin/x"]);
    assert_eq!(image.config.env, [("A".to_owned(), "B".to_lowercase())]);
}

#[test]
fn a_pulled_image_is_found_without_the_registry() {
    let server = Server::registry(image(), |_, response| response);
    let bench = Bench::new();
    let text = format!("{}/some/app:v1", server.host);
    let reference: Reference = text.parse().unwrap();
    let never = wait(bench.store.resolve(&reference, PullPolicy::Never, &PullOptions::default()));
    assert!(matches!(never, Err(Error::NotPresent { .. })));
    assert_eq!(bench.store.find(&reference).unwrap(), None);

    let seen: Arc<Mutex<Vec<Progress>>> = Arc::default();
    let sink = Arc::clone(&seen);
    let options = PullOptions::default().on_progress(move |progress| sink.lock().unwrap().push(progress));
    let pulled = bench.pull(&text, &options).unwrap();
    assert_converted(&pulled);
    assert_eq!(pulled.digest, Digest::sha256(&image().manifest));
    assert_eq!(bench.litter(), [""; 0], "layers are removed once converted");
    let seen = seen.lock().unwrap().clone();
    assert_eq!((seen.first(), seen.last()), (Some(&Progress::Resolving), Some(&Progress::Done)));
    let whole = |p: &&Progress| matches!(p, Progress::Downloading { bytes, total, .. } if bytes == total);
    assert!(seen.iter().filter(whole).count() >= 3);

    let before = server.requests("").len();
    assert_eq!(bench.store.find(&reference).unwrap().as_ref(), Some(&pulled));
    for policy in [PullPolicy::Never, PullPolicy::IfMissing] {
        assert_eq!(wait(bench.store.resolve(&reference, policy, &PullOptions::default())).unwrap(), pulled);
    }
    assert_eq!(server.requests("").len(), before);
    // Asked again, the registry gives the manifest, and nothing else is fetched.
    assert_eq!(
        wait(bench.store.resolve(&reference, PullPolicy::Always, &PullOptions::default())).unwrap(),
        pulled
    );
    assert_eq!(server.requests("").len(), before + 1);

    let listed = bench.store.list().unwrap();
    assert_eq!((listed.len(), &listed[0].image, &listed[0].references), (1, &pulled, &vec![text]));
    assert!(listed[0].on_disk >= pulled.size && listed[0].pulled_at.elapsed().unwrap().as_secs() < 3600);
    assert!(bench.store.removal().unwrap().remove(&pulled.digest).unwrap());
    assert!(!bench.store.removal().unwrap().remove(&pulled.digest).unwrap());
    assert_eq!(bench.store.list().unwrap(), []);
    assert_eq!(bench.store.find(&reference).unwrap(), None);
    assert_eq!(bench.litter(), [""; 0]);
}

#[test]
fn a_cut_download_goes_on_where_it_broke_off() {
    let image = image();
    let (digest, size) = largest(&image);
    let (cut_digest, count) = (digest.clone(), AtomicUsize::new(0));
    let server = Server::registry(image, move |request, mut response| {
        if request.path.ends_with(&cut_digest) && count.fetch_add(1, Ordering::Relaxed) < 3 {
            response.cut = Some(70_000);
        }
        response
    });
    let bench = Bench::new();
    let pulled = bench.pull(&format!("{}/app", server.host), &PullOptions::default()).unwrap();
    assert_converted(&pulled);
    let ranges: Vec<Option<String>> =
        server.requests(&digest).iter().map(|request| request.headers.get("range").cloned()).collect();
    let starts = [70_000, 140_000, 210_000].map(|start| Some(format!("bytes={start}-")));
    assert_eq!(ranges, [&[None][..], &starts].concat());
    assert!(size > 210_000);
}

#[test]
fn another_pull_goes_on_from_what_a_broken_one_left() {
    let image = image();
    let (digest, _) = largest(&image);
    let broken = digest.clone();
    let server = Server::registry(image.clone(), move |request, mut response| {
        if request.path.ends_with(&broken) {
            response.cut = Some(if request.headers.contains_key("range") { 0 } else { 100_000 });
        }
        response
    });
    let bench = Bench::new();
    let error = bench.pull(&format!("{}/app", server.host), &PullOptions::default()).unwrap_err();
    assert!(matches!(error, Error::Interrupted { got: 100_000, attempts: 5, .. }), "{error}");

    let healthy = Server::registry(image.clone(), |_, response| response);
    assert_converted(&bench.pull(&format!("{}/app", healthy.host), &PullOptions::default()).unwrap());
    assert_eq!(healthy.requests(&digest)[0].headers["range"], "bytes=100000-");

    // A registry that knows no ranges sends it whole, and that is as good.
    let bench = Bench::new();
    bench.pull(&format!("{}/app", server.host), &PullOptions::default()).unwrap_err();
    let whole = image.clone();
    let stubborn =
        Server::registry(image.clone(), move |request, response| match request.headers.get("range") {
            Some(_) => Response::new(200, whole.blobs[request.path.rsplit('/').next().unwrap()].clone()),
            None => response,
        });
    assert_converted(&bench.pull(&format!("{}/app", stubborn.host), &PullOptions::default()).unwrap());

    // What was left behind may be wrong: then it is fetched anew.
    let bench = Bench::new();
    bench.pull(&format!("{}/app", server.host), &PullOptions::default()).unwrap_err();
    let part = bench.path("store/blobs").join(format!("{}.part", digest.replace(':', "-")));
    let mut bytes = fs::read(&part).unwrap();
    bytes[5] ^= 1;
    fs::write(&part, bytes).unwrap();
    assert_converted(&bench.pull(&format!("{}/app", healthy.host), &PullOptions::default()).unwrap());
}

#[test]
fn answers_that_are_no_content_are_not_taken_for_it() {
    let image = image();
    let (digest, _) = largest(&image);
    let content = image.clone();
    let server = Server::registry(image, move |request, response| {
        // The right bytes with the wrong status: a range that was not asked for, or an error.
        let Some(blob) = content.blobs.get(request.path.rsplit('/').next().unwrap()) else { return response };
        if request.path.ends_with(&digest) { Response::new(416, blob.clone()) } else { response }
    });
    let error = Bench::new().pull(&format!("{}/app", server.host), &PullOptions::default()).unwrap_err();
    assert!(matches!(error, Error::Interrupted { got: 0, .. }), "{error}");
}

#[test]
fn what_dead_pulls_left_is_swept_away() {
    let bench = Bench::new();
    let (left, part) = (bench.path("store/tmp/sha256-dead"), bench.path("store/blobs/sha256-old.part"));
    fs::create_dir(&left).unwrap();
    fs::write(left.join("disk.erofs"), "half").unwrap();
    let week = std::time::Duration::from_secs(8 * 24 * 3600);
    fs::File::create(&part).unwrap().set_modified(std::time::SystemTime::now() - week).unwrap();
    fs::write(bench.path("store/blobs/sha256-new.part"), "may be gone on with").unwrap();
    bench.convert(&layers(), Compression::Gzip, &PullOptions::default()).unwrap();
    assert_eq!(bench.litter(), ["sha256-new.part"]);
}

#[test]
fn a_blob_that_is_not_its_digest_is_refused() {
    let image = image();
    let (digest, _) = largest(&image);
    for change in [|body: &mut Vec<u8>| body[1000] ^= 1, |body: &mut Vec<u8>| body.extend([0; 70_000])] {
        let wrong = digest.clone();
        let server = Server::registry(image.clone(), move |request, mut response| {
            if request.path.ends_with(&wrong) {
                change(&mut response.body);
            }
            response
        });
        let bench = Bench::new();
        let error = bench.pull(&format!("{}/app", server.host), &PullOptions::default()).unwrap_err();
        assert!(matches!(error, Error::DigestMismatch { .. } | Error::SizeMismatch { .. }), "{error}");
        assert!(bench.store.list().unwrap().is_empty());
    }
    // A manifest asked for by digest must have it.
    let server = Server::registry(image.clone(), |request, mut response| {
        if request.path.contains("/manifests/") {
            response.body.push(b' ');
        }
        response
    });
    let asked = format!("{}/app@{}", server.host, Digest::sha256(&image.manifest));
    assert!(matches!(Bench::new().pull(&asked, &PullOptions::default()), Err(Error::DigestMismatch { .. })));
}

#[test]
fn servers_that_fail_are_asked_again_and_missing_things_are_named() {
    let image = image();
    let (digest, _) = largest(&image);
    let (flaky, count) = (digest.clone(), AtomicUsize::new(0));
    let server = Server::registry(image.clone(), move |request, response| {
        let fails = request.path.ends_with(&flaky) && count.fetch_add(1, Ordering::Relaxed) < 2;
        if fails { Response::new(503, "busy") } else { response }
    });
    assert_converted(&Bench::new().pull(&format!("{}/app", server.host), &PullOptions::default()).unwrap());

    let server = Server::new(|_| Response::new(404, "no"));
    let error =
        Bench::new().pull(&format!("{}/no/such:tag", server.host), &PullOptions::default()).unwrap_err();
    let Error::NotFound { reference, .. } = &error else { panic!("{error}") };
    assert!(reference.ends_with("/no/such:tag"));
    // Nobody listens on a port that was just given back.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let error = Bench::new().pull(&format!("127.0.0.1:{port}/app"), &PullOptions::default()).unwrap_err();
    assert!(matches!(error, Error::Network { .. }), "{error}");
}

fn user() -> Option<Credentials> {
    Some(Credentials { username: "me".to_owned(), password: "secret:1".to_owned() })
}

fn has_basic(request: &Request) -> bool {
    request.headers.get("authorization") == Some(&format!("Basic {}", STANDARD.encode("me:secret:1")))
}

#[test]
fn a_token_is_asked_for_once_and_shown_from_then_on() {
    for anonymous in [true, false] {
        let content = image();
        let server = Server::new(move |request| {
            if request.path.starts_with("/token") {
                assert!(request.path.contains("scope=repository%3Aa%2Fb%3Apull"), "{}", request.path);
                assert!(request.path.contains("service=s"), "{}", request.path);
                let welcome = anonymous || has_basic(request);
                return if welcome {
                    Response::new(200, r#"{"token":"t0k"}"#)
                } else {
                    Response::new(401, "who?")
                };
            }
            if request.headers.get("authorization").map(String::as_str) == Some("Bearer t0k") {
                return support::http::registry(&content, request);
            }
            let realm = format!("http://{}/token", request.headers["host"]);
            Response::new(401, "").header(
                "www-authenticate",
                format!(r#"Bearer realm="{realm}",service="s",scope="repository:a/b:pull""#),
            )
        });
        let bench = Bench::new();
        let reference = format!("{}/a/b", server.host);
        if !anonymous {
            let error = bench.pull(&reference, &PullOptions::default()).unwrap_err();
            let Error::Unauthorized { registry, repository, .. } = &error else { panic!("{error}") };
            assert_eq!((registry, repository.as_str()), (&server.host, "a/b"));
            assert!(error.to_string().contains("docker login"));
        }
        let asked = server.requests("/token").len();
        let options = PullOptions { credentials: user().filter(|_| !anonymous), ..PullOptions::default() };
        assert_converted(&bench.pull(&reference, &options).unwrap());
        // The manifest and the configuration come one after the other; downloads share what they found.
        assert_eq!(server.requests("/token").len(), asked + 1);
    }
}

#[test]
fn a_password_goes_to_the_registry_and_not_where_it_redirects() {
    let content = image();
    let storage = Server::registry(content.clone(), |_, response| response);
    let elsewhere = storage.host.replace("127.0.0.1", "localhost");
    let server = Server::new(move |request| {
        if !has_basic(request) {
            return Response::new(401, "").header("www-authenticate", r#"Basic realm="r""#);
        }
        if request.path.contains("/blobs/") {
            return Response::new(307, "").header("location", format!("http://{elsewhere}{}", request.path));
        }
        support::http::registry(&content, request)
    });
    let bench = Bench::new();
    let config = bench.path("config.json");
    let auth = STANDARD.encode("me:secret:1");
    fs::write(&config, format!(r#"{{"auths":{{"{}":{{"auth":"{auth}"}}}}}}"#, server.host)).unwrap();
    let options = PullOptions { docker_config: Some(config), ..PullOptions::default() };
    assert_converted(&bench.pull(&format!("{}/app", server.host), &options).unwrap());
    assert!(!storage.requests("").is_empty());
    assert!(storage.requests("").iter().all(|request| !request.headers.contains_key("authorization")));
    let nobody = PullOptions { docker_config: Some(bench.path("none")), ..PullOptions::default() };
    let error = Bench::new().pull(&format!("{}/app", server.host), &nobody).unwrap_err();
    assert!(matches!(error, Error::Unauthorized { .. }), "{error}");
}

#[test]
fn the_image_for_the_platform_is_taken_from_an_index() {
    let mut content = image();
    let entry = |manifest: &[u8], architecture: &str| {
        let (digest, size) = (Digest::sha256(manifest), manifest.len());
        format!(
            r#"{{"digest":"{digest}","size":{size},"platform":{{"os":"linux","architecture":"{architecture}"}}}}"#
        )
    };
    let index = |entries: &[String]| format!(r#"{{"schemaVersion":2,"manifests":[{}]}}"#, entries.join(","));
    let right = content.manifest.clone();
    let entries = [entry(b"{}", "arm64"), entry(&right, "amd64"), entry(b"{}", "s390x")];
    content.manifest = index(&entries).into_bytes();
    let server = Server::registry(content.clone(), |_, response| response);
    let bench = Bench::new();
    let pulled = bench.pull(&format!("{}/app", server.host), &PullOptions::default()).unwrap();
    assert_eq!(pulled.digest, Digest::sha256(&right));
    assert_converted(&pulled);

    content.manifest = index(&[entries[0].clone(), entries[2].clone()]).into_bytes();
    let server = Server::registry(content, |_, response| response);
    let error = Bench::new().pull(&format!("{}/app", server.host), &PullOptions::default()).unwrap_err();
    assert!(
        error.to_string().contains("linux/amd64") && error.to_string().contains("linux/arm64, linux/s390x"),
        "{error}"
    );
}

#[test]
fn pulls_at_the_same_time_do_the_work_once() {
    let server = Server::registry(image(), |_, response| response);
    let bench = Bench::new();
    let text = format!("{}/app", server.host);
    let images: Vec<_> = thread::scope(|scope| {
        // A store of its own for each, as in different processes: flock knows open files, not processes.
        let pull = || {
            let store = cubby_image::Store::open(bench.path("store")).unwrap();
            wait(store.resolve(&text.parse().unwrap(), PullPolicy::Always, &PullOptions::default())).unwrap()
        };
        let threads: Vec<_> = (0..6).map(|_| scope.spawn(pull)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(images.windows(2).all(|pair| pair[0] == pair[1]));
    assert_converted(&images[0]);
    for digest in image().blobs.keys() {
        let fetched = server.requests(&format!("/blobs/{digest}")).len();
        assert!(fetched <= 1, "{digest} was fetched {fetched} times");
    }
}

#[test]
fn two_processes_do_the_work_once() {
    let server = Server::registry(image(), |_, response| response);
    let bench = Bench::new();
    let binary = std::env::current_exe().unwrap();
    let start = || {
        let mut command = Command::new(&binary);
        command.args(["--exact", "as_a_process_of_its_own", "--nocapture"]);
        command
            .env("CUBBY_TEST_STORE", bench.path("store"))
            .env("CUBBY_TEST_REFERENCE", format!("{}/app", server.host));
        command.stdout(Stdio::null()).spawn().unwrap()
    };
    let processes: Vec<Child> = (0..3).map(|_| start()).collect();
    for mut process in processes {
        assert!(process.wait().unwrap().success());
    }
    for digest in image().blobs.keys() {
        assert!(server.requests(&format!("/blobs/{digest}")).len() <= 1);
    }
    assert_eq!(bench.store.list().unwrap().len(), 1);
}

/// What [`two_processes_do_the_work_once`] runs; on its own it has nothing to do.
#[test]
fn as_a_process_of_its_own() {
    let (Ok(store), Ok(reference)) =
        (std::env::var("CUBBY_TEST_STORE"), std::env::var("CUBBY_TEST_REFERENCE"))
    else {
        return;
    };
    let store = cubby_image::Store::open(store).unwrap();
    wait(store.resolve(&reference.parse().unwrap(), PullPolicy::IfMissing, &PullOptions::default())).unwrap();
}

#[test]
fn a_dropped_pull_ends() {
    let (sent, hung) = std::sync::mpsc::channel();
    let sent = Mutex::new(sent);
    let server = Server::registry(image(), move |request, mut response| {
        if request.path.contains("/blobs/") {
            sent.lock().unwrap().send(()).unwrap();
            response.cut = Some(10);
        }
        response
    });
    let bench = Bench::new();
    let reference: Reference = format!("{}/app", server.host).parse().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let options = PullOptions::default();
    runtime.block_on(async {
        let mut pull = Box::pin(bench.store.resolve(&reference, PullPolicy::IfMissing, &options));
        let context = &mut std::task::Context::from_waker(std::task::Waker::noop());
        assert!(pull.as_mut().poll(context).is_pending());
        hung.recv().unwrap();
    });
    // Whoever has the image's lock next can make it: the dropped pull lets go of it.
    let healthy = Server::registry(image(), |_, response| response);
    assert_converted(&bench.pull(&format!("{}/app", healthy.host), &PullOptions::default()).unwrap());
}

/// Debian's registry on a port of its own.
struct DockerRegistry {
    process: Child,
    host: String,
}

impl DockerRegistry {
    fn start(dir: &Path, auth: &str) -> Self {
        let config = dir.join("registry.yml");
        let data = dir.join("registry-data");
        let yaml = format!(
            "version: 0.1\nlog:\n  level: info\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: 127.0.0.1:0\n{auth}",
            data.display()
        );
        fs::write(&config, yaml).unwrap();
        let mut command = Command::new("docker-registry");
        command.args(["serve", config.to_str().unwrap()]).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut process = command.spawn().expect("docker-registry is needed by this test");
        let mut lines = BufReader::new(process.stderr.take().unwrap()).lines();
        let host = lines.find_map(|line| {
            let line = line.unwrap();
            let (_, rest) = line.split_once("listening on ")?;
            Some(rest.split(['"', ' ', ',']).next().unwrap().to_owned())
        });
        thread::spawn(move || lines.for_each(drop));
        Self { process, host: host.expect("the registry did not start") }
    }
}

impl Drop for DockerRegistry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn a_real_registry_and_every_local_form_give_the_same_disk() {
    let bench = Bench::new();
    let layout = bench.path("source");
    image().write(&layout);
    let registry = DockerRegistry::start(bench.dir.path(), "");
    let source = format!("oci:{}:t", layout.display());
    let (archive, directory) = (bench.path("docker.tar"), bench.path("skopeo-dir"));
    let policy = ["--insecure-policy", "copy", "--quiet"];
    let docker = format!("docker-archive:{}:app:v1", archive.display());
    let dir = format!("dir:{}", directory.display());
    let remote = format!("docker://{}/team/app:v1", registry.host);
    for target in [&docker, &dir, &remote] {
        run("skopeo", &[&policy[..], &["--dest-tls-verify=false", &source, target]].concat());
    }
    let bytes = |reference: &str| {
        let bench = Bench::new();
        let image = bench.pull(reference, &PullOptions::default()).unwrap();
        assert_converted(&image);
        let bytes = fs::read(&image.disk).unwrap();
        (image.digest, bytes)
    };
    let (digest, expected) = bytes(&source);
    assert_eq!(digest, Digest::sha256(&image().manifest));
    for reference in
        [dir, format!("{}/team/app:v1", registry.host), format!("{}/team/app@{digest}", registry.host)]
    {
        assert!(bytes(&reference) == (digest.clone(), expected.clone()), "{reference}");
    }
    // No manifest, so another identity: all but the UUID is the same.
    for reference in [docker, format!("docker-archive:{}", archive.display())] {
        let (_, got) = bytes(&reference);
        assert_eq!((&got[..1024], &got[4096..]), (&expected[..1024], &expected[4096..]), "{reference}");
    }
    let missing = format!("docker-archive:{}:app:v2", archive.display());
    assert!(matches!(Bench::new().pull(&missing, &PullOptions::default()), Err(Error::NotFound { .. })));
}

#[test]
fn a_real_registry_with_passwords_is_logged_in_to() {
    let bench = Bench::new();
    // bcrypt of "secret:1".
    let htpasswd = bench.path("htpasswd");
    fs::write(&htpasswd, "me:$2y$05$abcdefghijklmnopqrstuuc2RWYCqD8uiz/VvbUhjnWVTN2gpX.p2\n").unwrap();
    let auth = format!("auth:\n  htpasswd:\n    realm: cubby\n    path: {}\n", htpasswd.display());
    let registry = DockerRegistry::start(bench.dir.path(), &auth);
    let layout = bench.path("source");
    image().write(&layout);
    let target = format!("docker://{}/app:v1", registry.host);
    let source = format!("oci:{}:t", layout.display());
    run(
        "skopeo",
        &[
            "--insecure-policy",
            "copy",
            "--quiet",
            "--dest-tls-verify=false",
            "--dest-creds=me:secret:1",
            &source,
            &target,
        ],
    );
    let reference = format!("{}/app:v1", registry.host);
    let nobody = PullOptions { docker_config: Some(bench.path("none")), ..PullOptions::default() };
    assert!(matches!(bench.pull(&reference, &nobody), Err(Error::Unauthorized { .. })));
    let options = PullOptions { credentials: user(), ..PullOptions::default() };
    assert_converted(&bench.pull(&reference, &options).unwrap());
}

#[test]
fn a_local_image_that_changed_is_converted_again() {
    let bench = Bench::new();
    let pull = |content: &str| {
        let layer = archive(&[file("f", content)]);
        bench.convert(&[layer], Compression::Gzip, &PullOptions::default()).unwrap()
    };
    let (first, second) = (pull("1"), pull("2"));
    assert_ne!(first.digest, second.digest);
    assert_eq!(Erofs::open(&second.disk).read()[&b"/f"[..]].content, b"2");
    assert_eq!(pull("2"), second);
}

#[test]
fn pulls_and_removals_at_once_leave_whole_images_and_nothing_else() {
    let server = Server::registry(image(), |_, response| response);
    let bench = Bench::new();
    let text = format!("{}/app", server.host);
    let relied_on = AtomicUsize::new(0);
    let pull = || {
        for _ in 0..20 {
            let pulled = bench.pull(&text, &PullOptions::default()).unwrap();
            let hold = bench.store.hold().unwrap();
            // It may be gone again; but what is here now stays as long as it is relied on.
            if let Some(image) = bench.store.image(&pulled.digest).unwrap() {
                std::thread::yield_now();
                assert_eq!(std::fs::metadata(&image.disk).unwrap().len(), pulled.size);
                relied_on.fetch_add(1, Ordering::Relaxed);
            }
            drop(hold);
        }
    };
    let digest = Digest::sha256(&image().manifest);
    let removed = std::thread::scope(|scope| {
        let pulls = [scope.spawn(pull), scope.spawn(pull), scope.spawn(pull)];
        let mut removed = 0;
        while !pulls.iter().all(|pull| pull.is_finished()) {
            removed += usize::from(bench.store.removal().unwrap().remove(&digest).unwrap());
        }
        removed
    });
    assert!(removed > 0 && relied_on.into_inner() > 0);
    assert_eq!(bench.litter(), [""; 0]);
    bench.store.removal().unwrap().remove(&digest).unwrap();
    assert_eq!(bench.store.list().unwrap(), []);
    // The way back.
    bench.pull(&text, &PullOptions::default()).unwrap();
    let reference: Reference = text.parse().unwrap();
    assert!(bench.store.removal().unwrap().forget(&reference).unwrap());
    assert!(!bench.store.removal().unwrap().forget(&reference).unwrap());
    assert_eq!(bench.store.find(&reference).unwrap(), None);
    let listed = bench.store.list().unwrap();
    assert_eq!((listed.len(), listed[0].references.len()), (1, 0));
}
