//! `cargo xtask python-suite`: modules of Python's own tests in a sandbox, and in a container of the same image (runc,
//! with the rights that docker gives), test by test. Where the two differ has to be in the table of
//! `docs/python-suite.md`, with the reason, and what is there has to be so.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, bail};

use crate::progress::{note, step};
use crate::within::Around;
use crate::{assets, images, kvm, packages, process, workspace};

/// The modules that are looked at unless others are named.
const MODULES: [&str; 5] = ["test_mmap", "test_os", "test_pty", "test_socket", "test_subprocess"];

/// What runs one module, on either side.
const PROGRAM: &str = include_str!("python_suite/module.py");

/// The container: docker's mounts, capabilities and namespaces.
const CONTAINER: &str = include_str!("python_suite/container.json");

/// What docker writes into a container without a network.
const HOSTS: &str = "127.0.0.1\tlocalhost\n::1\tlocalhost\n127.0.1.1\tpython-suite\n";

/// The document whose table has the differences.
const DOCUMENT: &str = "docs/python-suite.md";

/// One sandbox for all modules: `$1` the image, `$2` where results go, `$3` the program, then the modules.
const IN_A_SANDBOX: &str = r#"
image=$1 results=$2 program=$3
shift 3
cubby create --quiet --name python-suite --network none --memory 1g --disk 8g "$image" || exit 125
for module; do
    echo "    $module" >&2
    cubby exec --timeout 40m python-suite python3 -c "$program" "$module" \
        > "$results/$module" 2> "$results/$module.log" || echo "    $module ended with $?" >&2
done
cubby rm -f python-suite
"#;

/// What became of each test, by its name.
type Results = BTreeMap<String, Outcome>;

/// How a test ended, and why if it did not pass.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Outcome {
    ended: String,
    why: String,
}

/// A row of the document: a test, and how it ends in the sandbox and in the container.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Difference {
    test: String,
    sandbox: String,
    container: String,
}

/// Runs `modules` on both sides and compares them; all of [`MODULES`] if there are none.
pub fn run(modules: &[String]) -> Result<()> {
    let needs = [packages::KERNEL, packages::IMAGES, packages::CONTAINER];
    step("packages", || packages::ensure("Python's own tests", &needs))?;
    let modules: Vec<String> =
        if modules.is_empty() { MODULES.map(str::to_owned).to_vec() } else { modules.to_vec() };
    let layout = images::python_suite()?;
    let assets = step("guest kernel, guest agent, sandbox process", || assets::build(assets::Cargo::Shows))?;
    let results = workspace::target()?.join("python-suite");
    let (sandbox, container) = (results.join("sandbox"), results.join("container"));
    for dir in [&sandbox, &container] {
        if dir.exists() {
            fs::remove_dir_all(dir)?;
        }
        fs::create_dir_all(dir)?;
    }
    step("in a container", || in_a_container(&layout, &results, &modules))?;
    step("in a sandbox", || in_a_sandbox(&layout, &assets, &sandbox, &modules))?;
    let document = fs::read_to_string(workspace::root()?.join(DOCUMENT))?;
    step("comparison", || compare(&read(&sandbox, &modules)?, &read(&container, &modules)?, &document))
}

fn in_a_sandbox(layout: &Path, assets: &Path, results: &Path, modules: &[String]) -> Result<()> {
    let mut cargo = workspace::cargo()?;
    process::run(cargo.args(["build", "--quiet", "--package", "cubby-cli"]))?;
    let binaries = workspace::target()?.join("debug");
    let path = format!("PATH={}:{}", binaries.display(), std::env::var("PATH").unwrap_or_default());
    let mut program: Vec<OsString> =
        ["env", &path, "sh", "-c", IN_A_SANDBOX, "sh"].map(OsString::from).into();
    program.push(format!("oci:{}", layout.display()).into());
    program.extend([results.into(), PROGRAM.into()]);
    program.extend(modules.iter().map(OsString::from));
    let around = Around { assets, image: None, registry: false, clients: None, in_memory: false };
    match kvm::run(&kvm::Options::new(kvm::Mode::Normal), &around.command(&program)?)? {
        0 => Ok(()),
        code => bail!("the sandbox ended with {code}"),
    }
}

fn in_a_container(layout: &Path, results: &Path, modules: &[String]) -> Result<()> {
    let bundle = results.join("bundle");
    // Its files are root's.
    process::run_quietly(process::as_root("rm").arg("-rf").arg(&bundle))?;
    let image = format!("{}:latest", layout.display());
    process::run_quietly(process::as_root("umoci").args(["unpack", "--image", &image]).arg(&bundle))?;
    for (name, content) in [("config.json", String::new()), ("rootfs/etc/hosts", HOSTS.to_owned())] {
        write_as_root(&bundle.join(name), &content)?;
    }
    for module in modules {
        note(module);
        let mut config: serde_json::Value = serde_json::from_str(CONTAINER)?;
        let arguments = config.pointer_mut("/process/args").context("no arguments in container.json")?;
        *arguments = serde_json::json!(["python3", "-c", PROGRAM, module]);
        write_as_root(&bundle.join("config.json"), &config.to_string())?;
        let results = results.join("container");
        let mut runc = process::as_root("runc");
        runc.args(["run", "--bundle"]).arg(&bundle).arg(format!("cubby-{}-{module}", std::process::id()));
        runc.stdin(Stdio::null()).stdout(File::create(results.join(module))?);
        runc.stderr(File::create(results.join(format!("{module}.log")))?);
        process::run(&mut runc)?;
    }
    process::run_quietly(process::as_root("rm").arg("-rf").arg(&bundle))
}

fn write_as_root(path: &Path, content: &str) -> Result<()> {
    use std::io::Write;
    let mut tee = process::as_root("tee");
    let mut child = tee.arg(path).stdin(Stdio::piped()).stdout(Stdio::null()).spawn()?;
    child.stdin.take().context("no input")?.write_all(content.as_bytes())?;
    if !child.wait()?.success() {
        bail!("cannot write {}", path.display());
    }
    Ok(())
}

/// What `module.py` has printed. A module without its last line has not come to its end.
fn read(dir: &Path, modules: &[String]) -> Result<Results> {
    let mut all = Results::new();
    for module in modules {
        let path: PathBuf = dir.join(module);
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let results = parse(&text);
        if !results.contains_key(module) {
            bail!("{module} did not come to its end: see {}.log", path.display());
        }
        all.extend(results);
    }
    Ok(all)
}

fn parse(text: &str) -> Results {
    let mut results = Results::new();
    for line in text.lines() {
        let mut fields = line.split('\t').map(str::to_owned);
        if let (Some(ended), Some(test)) = (fields.next(), fields.next()) {
            results.insert(test, Outcome { ended, why: fields.next().unwrap_or_default() });
        }
    }
    // The module as a whole; whether it failed follows from its tests.
    results
}

/// Fails unless the differences are those of the document, and nothing failed on either side that is not among them.
fn compare(sandbox: &Results, container: &Results, document: &str) -> Result<()> {
    const ABSENT: &str = "absent";
    let ended = |results: &Results, test: &str| {
        results.get(test).map_or_else(|| ABSENT.to_owned(), |outcome| outcome.ended.clone())
    };
    let mut found: Vec<Difference> = Vec::new();
    let tests: std::collections::BTreeSet<&String> = sandbox.keys().chain(container.keys()).collect();
    for test in tests {
        let (here, there) = (ended(sandbox, test), ended(container, test));
        if here != there || here == "failed" {
            found.push(Difference { test: test.clone(), sandbox: here, container: there });
        }
    }
    let known = rows(document);
    let mut wrong = 0;
    for difference in found.iter().filter(|difference| !known.contains(difference)) {
        wrong += 1;
        let why = |results: &Results| {
            results.get(&difference.test).map(|outcome| outcome.why.clone()).unwrap_or_default()
        };
        note(format!(
            "{}: {} in the sandbox {}, {} in the container {}",
            difference.test,
            difference.sandbox,
            why(sandbox),
            difference.container,
            why(container)
        ));
    }
    // A part of the modules shows a part of the differences.
    let looked_at = |test: &str| test.split('.').nth(1).is_some_and(|module| sandbox.contains_key(module));
    for row in known.iter().filter(|row| !found.contains(row) && looked_at(&row.test)) {
        wrong += 1;
        note(format!("{}: the document has a difference that there is not", row.test));
    }
    let count = |results: &Results, what| results.values().filter(|outcome| outcome.ended == what).count();
    for (side, results) in [("sandbox", sandbox), ("container", container)] {
        note(format!(
            "in the {side}: {} passed, {} skipped, {} failed",
            count(results, "passed"),
            count(results, "skipped"),
            count(results, "failed")
        ));
    }
    match wrong {
        0 => Ok(()),
        wrong => bail!("{wrong} differences are not as {DOCUMENT} has them"),
    }
}

/// The rows of the document's table: test, sandbox, container, reason.
fn rows(document: &str) -> Vec<Difference> {
    document
        .lines()
        .filter_map(|line| {
            let cells: Vec<&str> = line.strip_prefix('|')?.split('|').map(str::trim).collect();
            let [test, sandbox, container, reason, ..] = cells[..] else { return None };
            let test = test.strip_prefix('`')?.strip_suffix('`')?;
            (!reason.is_empty()).then(|| Difference {
                test: test.into(),
                sandbox: sandbox.into(),
                container: container.into(),
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const DOCUMENT: &str = "\
| test | sandbox | container | why |
|---|---|---|---|
| `test.test_os.A.one` | passed | skipped | the container may not |
";

    fn results(one: &str, two: &str) -> Results {
        parse(&format!("{one}\ttest.test_os.A.one\twhy\n{two}\ttest.test_os.A.two\t\nexit\ttest_os\t0\n"))
    }

    #[test]
    fn only_the_differences_of_the_document_are_taken() {
        let container = results("skipped", "passed");
        compare(&results("passed", "passed"), &container, DOCUMENT).unwrap();
        // Another one, one that is gone, and a failure that both have.
        assert!(compare(&results("passed", "skipped"), &container, DOCUMENT).is_err());
        assert!(compare(&results("skipped", "passed"), &container, DOCUMENT).is_err());
        assert!(compare(&results("passed", "failed"), &results("skipped", "failed"), DOCUMENT).is_err());
        // A module that did not run says nothing about its rows.
        compare(&Results::new(), &Results::new(), DOCUMENT).unwrap();
    }

    #[test]
    fn a_row_without_a_reason_is_none() {
        assert_eq!(rows(DOCUMENT).len(), 1);
        assert_eq!(rows("| `test.a.b.c` | passed | failed | |").len(), 0);
    }
}
