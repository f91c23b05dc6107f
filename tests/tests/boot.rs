//! Boots that cannot succeed: each ends in an error that says how far it came and what to do.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use cubby_state::ProcessIdentity;
use cubby_tests::{builder, gone, kill, name, small_image, until, variable, within};
use cubbyhole::{Error, ExitReason, Sandbox, Status};
use serde_json::json;

async fn crashed(name: &str) -> ExitReason {
    let sandbox = Sandbox::get(name).await.unwrap();
    assert_eq!(sandbox.status().await.unwrap(), Status::Crashed);
    sandbox.last_exit().await.unwrap().unwrap().reason
}

/// A shell script in the place of the sandbox process.
fn program(dir: &Path, text: &str) -> PathBuf {
    let script = dir.join("cubby-sandbox");
    fs::write(&script, format!("#!/bin/sh\n{text}\n")).unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    script
}

/// A sandbox process that runs a copy of the real one with other variables.
fn runtime(dir: &Path, variables: &str) -> PathBuf {
    let copy = dir.join("bin/cubby-sandbox");
    fs::create_dir_all(dir.join("bin")).unwrap();
    fs::copy(variable("CUBBY_RUNTIME"), &copy).unwrap();
    program(dir, &format!("{variables} exec {}", copy.display()))
}

#[tokio::test]
async fn a_disk_that_is_no_image_fails_the_boot_where_it_is_mounted() {
    let files = tempfile::tempdir().unwrap();
    let reference = small_image(files.path(), &json!({ "Env": ["PURPOSE=to be overwritten"] }));
    let name = name("garbage");
    let sandbox = within("create", builder(&name).image(&reference).create()).await.unwrap();
    within("stop", sandbox.stop()).await.unwrap();
    let images = cubby_image::Store::open(cubby_tests::store().home().images()).unwrap();
    let disk = images.find(&reference.parse().unwrap()).unwrap().unwrap().disk;
    let length = usize::try_from(fs::metadata(&disk).unwrap().len()).unwrap();
    fs::set_permissions(&disk, fs::Permissions::from_mode(0o600)).unwrap();
    fs::write(&disk, vec![0xa5; length]).unwrap();

    let failed = match within("start", Sandbox::start(&name)).await {
        Err(Error::BootFailed { stage, message, console_tail, .. }) => {
            assert!(stage.contains("image"), "{stage}: {message}");
            assert!(message.contains("/dev/vda"), "{message}");
            // The kernel says more than the agent knows.
            assert!(console_tail.is_some_and(|tail| tail.contains("erofs")), "no word from the kernel");
            stage
        }
        other => panic!("{other:?}"),
    };
    // What is kept says the same.
    assert_eq!(crashed(&name).await, ExitReason::BootFailed { stage: failed });
    Sandbox::remove(&name).await.unwrap();
}

#[tokio::test]
async fn a_boot_without_kernel_and_agent_says_where_it_looked() {
    let dir = tempfile::tempdir().unwrap();
    let name = name("assetless");
    let runtime = runtime(dir.path(), "CUBBY_ASSETS=/no/such/assets");
    match within("create", builder(&name).runtime(&runtime).create()).await {
        Err(Error::BootFailed { stage, message, .. }) => {
            assert_eq!(stage, "assets");
            let beside = dir.path().join("lib/cubby");
            assert!(
                message.contains("/no/such/assets") && message.contains(beside.to_str().unwrap()),
                "{message}"
            );
            assert!(message.contains("cargo xtask install"), "{message}");
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(crashed(&name).await, ExitReason::BootFailed { stage: "assets".into() });
    Sandbox::remove(&name).await.unwrap();
}

#[tokio::test]
async fn an_agent_that_is_none_fails_the_boot_in_the_kernel() {
    let dir = tempfile::tempdir().unwrap();
    let assets = dir.path().join("assets");
    fs::create_dir(&assets).unwrap();
    let installed = PathBuf::from(variable("CUBBY_ASSETS"));
    let kernel = [installed.join("vmlinux"), installed.join("lib/cubby/vmlinux")];
    fs::copy(kernel.iter().find(|path| path.exists()).unwrap(), assets.join("vmlinux")).unwrap();
    fs::write(assets.join("cubby-agent"), "no program").unwrap();
    let name = name("agentless");
    let runtime = runtime(dir.path(), &format!("CUBBY_ASSETS={}", assets.display()));
    match within("create", builder(&name).runtime(&runtime).create()).await {
        Err(Error::BootFailed { stage, console_tail, .. }) => {
            assert_eq!(stage, "kernel");
            assert!(
                console_tail.is_some_and(|tail| tail.contains("Kernel panic")),
                "no word from the kernel"
            );
        }
        other => panic!("{other:?}"),
    }
    Sandbox::remove(&name).await.unwrap();
}

#[tokio::test]
async fn a_sandbox_process_that_is_not_there_is_looked_for_aloud() {
    let name = name("processless");
    let created = within("create", builder(&name).runtime("/no/such/cubby-sandbox").create()).await;
    match created {
        Err(error @ Error::RuntimeNotFound { .. }) => {
            assert!(error.to_string().contains("/no/such/cubby-sandbox"), "{error}");
        }
        other => panic!("{other:?}"),
    }
    // Nothing was made, so nothing has to be removed.
    assert!(matches!(Sandbox::get(&name).await, Err(Error::NotFound { .. })));
}

#[tokio::test]
async fn a_sandbox_process_that_dies_at_once_is_quoted() {
    let dir = tempfile::tempdir().unwrap();
    let script = program(dir.path(), "echo the reason of its death >&2; exit 3");
    let name = name("stillborn");
    let created = within("create", builder(&name).runtime(&script).create()).await;
    let Err(Error::Process { why, .. }) = created else { panic!("{created:?}") };
    assert!(why.contains("the reason of its death"), "{why}");
    assert!(matches!(crashed(&name).await, ExitReason::BootFailed { .. }));
    Sandbox::remove(&name).await.unwrap();
}

/// What the sandbox process has started can hold what a launch is answered on, and needs not end with it.
#[tokio::test]
async fn a_sandbox_process_that_dies_and_leaves_others_behind_is_not_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let left = dir.path().join("left");
    let script = format!(
        "exec 3<&0\nsetsid sh -c 'echo $$ > {0}.new; mv {0}.new {0}; exec sleep 86414' <&3 &\n\
         while ! test -e {0}; do sleep 0.01; done; exit 3",
        left.display()
    );
    let runtime = program(dir.path(), &script);
    let name = name("surrogate");
    let created = within("create", builder(&name).runtime(&runtime).create()).await;
    let Err(Error::Process { why, .. }) = created else { panic!("{created:?}") };
    assert!(why.contains("it is gone"), "{why}");
    assert!(matches!(crashed(&name).await, ExitReason::BootFailed { .. }));
    Sandbox::remove(&name).await.unwrap();
    // The other end is still held.
    kill(fs::read_to_string(left).unwrap().trim().parse().unwrap());
}

#[tokio::test]
async fn a_create_that_is_called_off_leaves_no_zombie() {
    let dir = tempfile::tempdir().unwrap();
    let pid = dir.path().join("pid");
    let script = format!("echo $$ > {0}.new; mv {0}.new {0}; exec sleep 86415", pid.display());
    let runtime = program(dir.path(), &script);
    let name = name("called-off");
    let create = tokio::spawn(builder(&name).runtime(&runtime).create());
    until("its process", async || pid.exists()).await;
    create.abort();
    assert!(create.await.unwrap_err().is_cancelled());
    let pid = fs::read_to_string(pid).unwrap().trim().parse().unwrap();
    let process = ProcessIdentity::of(pid).unwrap();
    // It is deaf to the end of its input, which is what would end a sandbox process.
    kill(pid);
    gone(&process).await;
}

#[tokio::test]
async fn an_image_that_is_not_there_is_an_image_error_and_leaves_no_sandbox() {
    let name = name("imageless");
    for reference in ["oci:/no/such/directory", "docker-archive:/no/such/file", "dir:/no/such/directory"] {
        let created = within("create", Sandbox::builder(&name).image(reference).create()).await;
        assert!(matches!(created, Err(Error::Image(_))), "{created:?}");
    }
    assert!(matches!(Sandbox::get(&name).await, Err(Error::NotFound { .. })));
}
