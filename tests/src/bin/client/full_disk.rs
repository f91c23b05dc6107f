//! What happens when the home's disk is full, at each step of a sandbox's life. A line is printed for each: what was
//! done, and what came of it.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;

use cubby_tests::{builder, keeper, process, signal, store, until, within};
use cubbyhole::{Error, Sandbox};
use rustix::process::Signal;

/// A file that takes all the space there is.
struct Filler(PathBuf);

impl Filler {
    fn fill() -> Self {
        let path = store().home().root().join("filler");
        let mut file = File::create(&path).unwrap();
        while file.write_all(&[0; 4096]).is_ok() {}
        while file.write_all(&[0]).is_ok() {}
        Self(path)
    }

    fn free(self) {
        std::fs::remove_file(self.0).unwrap();
    }
}

fn told(what: &str, outcome: Result<(), Error>) {
    match outcome {
        Ok(()) => println!("{what}: done"),
        Err(error) => {
            let mut text = error.to_string();
            let mut source = std::error::Error::source(&error);
            while let Some(cause) = source {
                text.push_str(&format!(": {cause}"));
                source = cause.source();
            }
            let debug = format!("{error:?}");
            println!("{what}: {} | {text}", debug.split([' ', '{']).next().unwrap());
        }
    }
}

/// Everything, in a home of a few MiB.
pub async fn run(name: &str) {
    let status = async || format!("{}", Sandbox::get(name).await.unwrap().status().await.unwrap());
    // The store is there, as it is for everybody but the first.
    drop(store());
    let filler = Filler::fill();
    told("create", within("create", builder(name).create()).await.map(drop));
    told("list", Sandbox::list().await.map(drop));
    filler.free();
    // Whatever is left of it can be removed.
    for handle in Sandbox::list().await.unwrap() {
        println!("left: {}", handle.status());
        Sandbox::remove(handle.name()).await.unwrap();
    }
    let sandbox = within("create", builder(name).create()).await.unwrap();
    sandbox.shell("echo kept > /root/note; sync").await.unwrap();

    let filler = Filler::fill();
    let write = "dd if=/dev/zero of=/root/big bs=64k count=256 conv=fsync 2>&1";
    let output = within("dd", sandbox.shell(write)).await.unwrap();
    println!("write: {}", if output.success() { "succeeded" } else { "failed" });
    let alive = within("echo", sandbox.exec("echo", ["alive"])).await.map(|output| output.stdout().unwrap());
    println!("alive: {}", alive.is_ok_and(|text| text == "alive\n"));
    told("stop", within("stop", sandbox.stop()).await);
    println!("after stop: {}", status().await);
    filler.free();
    let alive = within("echo", sandbox.exec("echo", ["alive"])).await.map(|output| output.stdout().unwrap());
    println!("still alive: {}", alive.is_ok_and(|text| text == "alive\n"));
    told("second stop", within("stop", sandbox.stop()).await);
    let again = within("start", Sandbox::start(name)).await.unwrap();
    let kept = within("cat", again.exec("cat", ["/root/note"])).await.unwrap();
    println!("kept: {:?}", kept.stdout().unwrap());

    // Asked by a signal, nobody is there to be refused.
    let filler = Filler::fill();
    let asked = process(name);
    signal(keeper(name).pid, Signal::TERM);
    // Its keeper waits for it only when its end is on record.
    until("its end", async || !asked.is_running()).await;
    filler.free();
    let report = within("the end", again.wait()).await.unwrap();
    println!("after TERM: {}, {:?}", status().await, report.reason);
    let again = within("start", Sandbox::start(name)).await.unwrap();

    let filler = Filler::fill();
    let process = process(name);
    told("kill", within("kill", again.kill()).await);
    println!("killed: {}", !process.is_running());
    told("start", within("start", Sandbox::start(name)).await.map(drop));
    filler.free();
    let report = within("the end", again.wait()).await.unwrap();
    println!("after kill: {}, {:?}", status().await, report.reason);
    told("remove", Sandbox::remove(name).await);
}
