//! A host that cannot run virtual machines is told from one that can, at once and with a remedy.

use std::time::Duration;

use cubby_tests::{Client, image, name};
use cubbyhole::{Error, Sandbox};

use crate::CLIENT;

/// What the answer may take: 50 ms, and a hundred times that where every instruction is emulated.
fn at_once() -> Duration {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    Duration::from_millis(if cpuinfo.contains("QEMU TCG") { 5000 } else { 50 })
}

#[tokio::test]
async fn a_host_without_kvm_is_unsupported_at_once_with_a_remedy() {
    // The image is not what is measured.
    let images = cubby_image::Store::open(cubby_tests::store().home().images()).unwrap();
    let options = cubby_image::PullOptions::default();
    images.resolve(&image().parse().unwrap(), cubby_image::PullPolicy::IfMissing, &options).await.unwrap();
    // A namespace of its own in which /dev/kvm is another device; root needs no user namespace for it.
    let user = if rustix::process::geteuid().is_root() { "--mount" } else { "--map-root-user" };
    let script = "mount --bind /dev/null /dev/kvm && exec \"$@\"";
    let name = name("unsupported");
    let (image, unshare) = (image(), ["unshare", user, "--mount", "sh", "-c", script, "sh"]);
    let mut client = Client::start(&[&unshare[..], &[CLIENT, "create", &name, &image]].concat());
    let took = Duration::from_micros(client.line().await.parse().unwrap());
    assert_eq!(client.line().await, "unsupported");
    let (why, remedy) = (client.line().await, client.line().await);
    client.finish().await;
    assert!(why.contains("/dev/kvm"), "{why:?} does not say what stood in the way");
    assert!(!remedy.is_empty(), "no remedy");
    println!("unsupported after {took:?}: {why}; {remedy}");
    assert!(took <= at_once(), "it took {took:?}");
    // It is on record, and can be removed.
    let sandbox = Sandbox::get(&name).await.unwrap();
    let reason = sandbox.last_exit().await.unwrap().unwrap().reason;
    assert_eq!(reason, cubbyhole::ExitReason::HostUnsupported);
    Sandbox::remove(&name).await.unwrap();
    assert!(matches!(Sandbox::get(&name).await, Err(Error::NotFound { .. })));
}
