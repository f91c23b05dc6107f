//! What a user's machine can do to a sandbox: a disk that is full at each step. (What needs no guest is tried in the
//! library's own tests.)

use std::collections::BTreeMap;

use cubby_tests::{Client, image, name};

use crate::CLIENT;

#[tokio::test]
async fn a_full_disk_is_told_at_each_step_and_loses_nothing_that_was_synced() {
    let images = cubby_tests::store().home().images();
    let store = cubby_image::Store::open(images.clone()).unwrap();
    let options = cubby_image::PullOptions::default();
    store.resolve(&image().parse().unwrap(), cubby_image::PullPolicy::IfMissing, &options).await.unwrap();
    let directory = tempfile::tempdir().unwrap();
    // A namespace of its own in which the home is a small disk; root needs no user namespace for it.
    let user = if rustix::process::geteuid().is_root() { "--mount" } else { "--map-root-user" };
    let script = "mount -t tmpfs -o size=12m,mode=700 disk \"$CUBBY_HOME\" && cd \"$CUBBY_HOME\" && \
                  mkdir -m 700 -p cubby cubby/images && mount --bind \"$0\" cubby/images && exec \"$@\"";
    let home = format!("CUBBY_HOME={}", directory.path().display());
    let (images, name) = (images.display().to_string(), name("full"));
    let unshare = ["env", &home, "unshare", user, "--mount", "sh", "-c", script, &images];
    let mut client = Client::start(&[&unshare[..], &[CLIENT, "full-disk", &name]].concat());
    let mut told = BTreeMap::new();
    while let Some(line) = client.next_line().await {
        println!("{line}");
        let (what, outcome) = line.split_once(": ").unwrap();
        told.insert(what.to_owned(), outcome.to_owned());
    }
    client.finish().await;
    // What cannot be recorded is not begun: each refusal names the place and what to look at, and harms nothing. A kill is
    // done nevertheless, and what cannot be recorded then is told in the same words.
    for call in ["create", "stop", "kill"] {
        let text = &told[call];
        assert!(
            text.contains("space left") && text.contains(directory.path().to_str().unwrap()),
            "{call}: {text}"
        );
    }
    assert_eq!((told["list"].as_str(), told.get("left")), ("done", None));
    assert_eq!((told["after stop"].as_str(), told["still alive"].as_str()), ("Running", "true"));
    // The guest is told by its own kernel, and lives.
    assert_eq!((told["write"].as_str(), told["alive"].as_str()), ("failed", "true"));
    assert_eq!((told["second stop"].as_str(), told["kept"].as_str()), ("done", r#""kept\n""#));
    assert_eq!(told["after TERM"], "Stopped, Requested");
    // Until its end is on record it cannot begin again, and once there is room the record is true.
    assert_eq!(told["killed"], "true");
    assert!(told["start"].starts_with("InvalidState"), "{told:?}");
    assert_eq!(told["after kill"], "Stopped, Killed");
    assert_eq!(told["remove"], "done");
}
