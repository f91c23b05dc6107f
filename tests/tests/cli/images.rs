//! `pull`, `images`, `rmi` and `prune`, in a home of their own.

use std::path::Path;
use std::process::Output;

use cubby_tests::{name, small_image, within};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::{Terminal, assert_ended, command, printed, text};
use crate::CUBBY;

/// A home, and an image that is not in it.
struct Bench {
    home: TempDir,
    _files: TempDir,
    reference: String,
}

impl Bench {
    fn new() -> Self {
        let files = tempfile::tempdir().unwrap();
        let config = json!({ "Env": ["PATH=/usr/bin"], "Cmd": ["sh"] });
        let reference = small_image(files.path(), &config);
        Self { home: tempfile::tempdir().unwrap(), _files: files, reference }
    }

    fn home(&self) -> &Path {
        self.home.path()
    }

    async fn cubby(&self, arguments: &[&str]) -> Output {
        let run = command(arguments).env("CUBBY_HOME", self.home()).output();
        within(&arguments.join(" "), run).await.unwrap()
    }

    async fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(printed(&self.cubby(arguments).await)).unwrap()
    }
}

#[tokio::test]
async fn an_image_is_pulled_listed_and_kept_as_long_as_a_sandbox_needs_it() {
    let (bench, name) = (Bench::new(), name("cli-images"));
    let reference = bench.reference.as_str();
    for (line, said) in [
        (&["pull", "Not A Name"][..], "is not an image reference"),
        (&["pull", "oci:/no/such/directory"], "/no/such/directory"),
        (&["rmi", reference], "cubby images shows"),
        (&["rmi", "\x1b[2J"], "cubby images shows"),
    ] {
        let output = bench.cubby(line).await;
        assert_ended(&output, 1);
        let error = text(&output.stderr);
        assert!(error.contains(said) && !error.contains('\x1b'), "{line:?}: {error}");
    }
    let pulled = bench.cubby(&["pull", reference]).await;
    assert_eq!(printed(&pulled), format!("{reference}\n"));
    let steps = text(&pulled.stderr);
    assert!(
        steps.contains(&format!("converting {reference}\n")) && !steps.contains(['\r', '\x1b']),
        "{steps:?}"
    );
    assert_eq!(text(&bench.cubby(&["pull", "-q", reference]).await.stderr), "");

    let images = bench.json(&["images", "--json"]).await;
    let image = &images[0];
    assert_eq!(images.as_array().unwrap().len(), 1);
    assert_eq!((&image["references"], &image["used_by"]), (&json!([reference]), &json!([])));
    assert!(image["size_on_disk"].as_u64().unwrap() > 1 << 20, "{image}");
    let digest = image["digest"].as_str().unwrap();
    assert_eq!(printed(&bench.cubby(&["images", "-q"]).await), format!("{digest}\n"));

    printed(&bench.cubby(&["create", "--name", &name, "-m", "192m", reference]).await);
    assert_eq!(bench.json(&["images", "--json"]).await[0]["used_by"], json!([name]));
    let table = bench.cubby(&["images"]).await;
    let row = printed(&table).lines().nth(1).unwrap();
    assert!(row.contains(&digest[7..19]) && row.contains(&name), "{row}");
    for stopped in [false, true] {
        if stopped {
            printed(&bench.cubby(&["stop", &name]).await);
        }
        let refused = bench.cubby(&["rmi", digest]).await;
        assert_ended(&refused, 1);
        assert!(text(&refused.stderr).contains(&format!("cubby rm -f {name}")), "{refused:?}");
        assert_eq!(printed(&bench.cubby(&["prune", "-f", "--images"]).await), "freed 0 B\n");
    }
    let unasked = bench.cubby(&["prune"]).await;
    assert_ended(&unasked, 1);
    assert!(text(&unasked.stderr).contains("cubby prune -f"), "{unasked:?}");
    let pruned = bench.json(&["prune", "-f", "--json"]).await;
    assert_eq!((&pruned["sandboxes"], &pruned["images"][0]["digest"]), (&json!([name]), &json!(digest)));
    assert!(pruned["freed"].as_u64() > image["size_on_disk"].as_u64(), "{pruned}");
    assert_eq!(bench.json(&["images", "--json"]).await, json!([]));
    assert_eq!(bench.json(&["ls", "--json"]).await, json!([]));
}

#[tokio::test]
async fn a_prune_asks_and_takes_no_for_an_answer() {
    let bench = Bench::new();
    printed(&bench.cubby(&["pull", "-q", &bench.reference]).await);
    let home = format!("CUBBY_HOME={}", bench.home().display());
    for (answer, left, code) in [("", 1, 1), ("no", 1, 1), ("y", 0, 0)] {
        let mut terminal = Terminal::start(&["env", &home, CUBBY, "prune"], 24, 200);
        terminal.expect(&format!("image {}", bench.reference));
        terminal.expect("[y/N] ");
        terminal.type_in(&format!("{answer}\n"));
        assert_eq!(terminal.end().await, Some(code), "{answer:?}");
        let images = bench.json(&["images", "--json"]).await;
        assert_eq!(images.as_array().unwrap().len(), left, "{answer:?}");
    }
}

#[tokio::test]
async fn pruning_all_the_time_takes_no_image_from_a_create() {
    let bench = Bench::new();
    let creating = async {
        for number in 0..2 {
            let name = name(&format!("cli-prune-{number}"));
            // Pulled anew each time, because somebody has just removed it.
            printed(&bench.cubby(&["create", "--name", &name, "-m", "192m", &bench.reference]).await);
            // What it was made from is there.
            assert_eq!(printed(&bench.cubby(&["exec", &name, "sh", "-c", "echo well"]).await), "well\n");
            printed(&bench.cubby(&["rm", "-f", &name]).await);
        }
    };
    let pruning = async {
        loop {
            printed(&bench.cubby(&["prune", "-f", "--images"]).await);
        }
    };
    tokio::select! {
        () = creating => {}
        () = pruning => {}
    }
}
