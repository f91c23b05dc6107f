//! Programs that people use at a terminal, in `cubby run -it`: what they see, what their keys do, and that the terminal is
//! theirs again.

use std::time::Duration;

use cubby_tests::{BOUND, image, name, until};
use cubbyhole::{Sandbox, Status};

use super::terminal::{Terminal, flags};

/// `cubby run -it` with some more words.
fn run(name: &str, options: &[&str], command: &[&str], rows: u16, columns: u16) -> Terminal {
    let image = image();
    let run = ["run", "-it", "--name", name, "-m", "192m"];
    Terminal::cubby(&[&run[..], options, &[&image], command].concat(), rows, columns)
}

/// Types `keys` again and again until they have shown what they should: nothing tells when a program is ready for them.
fn insist(terminal: &mut Terminal, keys: &str, shown: &str) {
    let begin = std::time::Instant::now();
    loop {
        terminal.type_in(keys);
        if terminal.see(shown, Duration::from_millis(500)) {
            return;
        }
        assert!(begin.elapsed() < BOUND, "{keys:?} does not bring about {shown:?}");
    }
}

#[tokio::test]
async fn python_answers_is_interrupted_remembers_and_ends() {
    // What the image runs by itself.
    let mut terminal = run(&name("it-python"), &["--rm"], &[], 24, 80);
    let before = flags(&terminal.modes());
    terminal.expect(">>> ");
    terminal.type_in("6 * 7\n");
    terminal.expect("\r\n42\r\n");
    terminal.expect(">>> ");
    // What is waited for is not what is typed.
    // Python looks for interrupts between its steps: one that comes just before a sleep is seen after it.
    terminal.type_in(
        "import time; print('slee' + 'ping', flush=True); [time.sleep(0.1) for _ in iter(int, 1)]\n",
    );
    terminal.expect("sleeping\r\n");
    terminal.type_in("\x03");
    terminal.expect("KeyboardInterrupt");
    terminal.expect(">>> ");
    terminal.type_in("\x1b[A\x1b[A");
    terminal.watch("line from before", |screen| {
        let (row, _) = screen.cursor_position();
        screen.rows(0, 80).nth(row.into()).is_some_and(|line| line.trim_end() == ">>> 6 * 7")
    });
    terminal.type_in("\n");
    terminal.expect("\r\n42\r\n");
    terminal.expect(">>> ");
    terminal.type_in("\x04");
    until("the end", async || terminal.child().try_wait().unwrap().is_some()).await;
    assert_eq!(flags(&terminal.modes()), before);
    assert_eq!(terminal.end().await, Some(0));
}

#[tokio::test]
async fn top_refreshes_takes_the_size_of_its_terminal_and_quits() {
    // A command line that is wider than the first terminal, with its end where only the second shows it.
    let script = format!("sh -c ': {}end; sleep 86409; :' & exec top -c -d 1 -p $!", "x".repeat(100));
    let mut terminal = run(&name("it-top"), &["--rm"], &["sh", "-c", &script], 24, 80);
    let before = flags(&terminal.modes());
    terminal.watch("processes", |screen| {
        let text = screen.contents();
        text.contains("load average:") && text.contains("COMMAND") && text.contains("sh -c")
    });
    // top - 12:34:56 up …
    let clock = |screen: &vt100::Screen| {
        screen.rows(0, 80).next().and_then(|line| line.split_whitespace().nth(2).map(str::to_owned))
    };
    terminal.watch("refresh", {
        let first = std::cell::OnceCell::new();
        move |screen| clock(screen).is_some_and(|now| *first.get_or_init(|| now.clone()) != now)
    });
    terminal.resize(30, 200);
    terminal.watch("end of the long line", |screen| shown_of(screen, "xend").is_some());
    terminal.type_in("q");
    until("the end", async || terminal.child().try_wait().unwrap().is_some()).await;
    assert_eq!(flags(&terminal.modes()), before);
    assert_eq!(terminal.end().await, Some(0));
}

/// The line of the screen that has `text` in it.
fn shown_of(screen: &vt100::Screen, text: &str) -> Option<String> {
    let (_, columns) = screen.size();
    screen.rows(0, columns.get()).find(|line| line.contains(text))
}

#[tokio::test]
async fn vi_writes_a_file_that_is_on_the_disk_and_gives_the_terminal_back() {
    let name = name("it-vi");
    let mut terminal = run(&name, &["-w", "/root"], &["vi", "note"], 24, 80);
    let before = flags(&terminal.modes());
    terminal.watch("empty file", |screen| {
        shown_of(screen, "\"note\" [New File]").is_some()
            && shown_of(screen, "~").is_some()
            && screen.alternate_screen()
    });
    terminal.type_in("ihello from vi\x1b");
    terminal.watch("text", |screen| {
        screen.rows(0, 80).next().is_some_and(|line| line.trim_end() == "hello from vi")
    });
    terminal.type_in(":wq\r");
    until("the end", async || terminal.child().try_wait().unwrap().is_some()).await;
    terminal.watch("screen from before", |screen| !screen.alternate_screen());
    assert_eq!(flags(&terminal.modes()), before);
    assert_eq!(terminal.end().await, Some(0));
    let sandbox = Sandbox::get(&name).await.unwrap();
    assert_eq!(sandbox.status().await.unwrap(), Status::Stopped);
    let sandbox = cubby_tests::within("start", Sandbox::start(&name)).await.unwrap();
    assert_eq!(cubby_tests::shell(&sandbox, "cat /root/note").await, "hello from vi\n");
    cubby_tests::discard(sandbox).await;
}

#[tokio::test]
async fn bash_controls_its_jobs() {
    let mut terminal =
        run(&name("it-bash"), &["--rm", "-e", "PS1=prompt> "], &["bash", "--norc", "--noprofile"], 24, 80);
    terminal.expect("prompt> ");
    terminal.type_in("sleep 86410 &\n");
    terminal.expect("[1] ");
    terminal.expect("prompt> ");
    terminal.type_in("sh -c 'echo wait''ing; exec sleep 86411'\n");
    terminal.expect("waiting\r\n");
    terminal.type_in("\x1a");
    terminal.expect("[2]+  Stopped");
    terminal.expect("prompt> ");
    terminal.type_in("jobs\n");
    terminal.expect("[1]-  Running ");
    terminal.expect("[2]+  Stopped ");
    terminal.expect("prompt> ");
    terminal.type_in("bg\n");
    terminal.expect("[2]+ sh -c ");
    terminal.expect("prompt> ");
    terminal.type_in("jobs\n");
    terminal.expect("[1]-  Running ");
    terminal.expect("[2]+  Running ");
    terminal.expect("prompt> ");
    // In front, a key reaches it.
    terminal.type_in("fg %1\n");
    terminal.expect("\rsleep 86410\r\n");
    insist(&mut terminal, "\x03", "prompt> ");
    terminal.type_in("echo left: $(jobs | wc -l)\n");
    terminal.expect("left: 1\r\n");
    terminal.type_in("kill %2; wait; exit 3\n");
    assert_eq!(terminal.end().await, Some(3));
}

#[tokio::test]
async fn stats_renew_their_screen_and_leave_nothing_of_what_is_gone() {
    let sandboxes = [cubby_tests::sandbox("stats-one").await, cubby_tests::sandbox("stats-two").await];
    let [one, two] = sandboxes.each_ref().map(|sandbox| sandbox.name().to_owned());
    let mut terminal = Terminal::cubby(&["stats"], 60, 200);
    let before = flags(&terminal.modes());
    // What was there is written over.
    terminal.watch("both of them", |screen| {
        screen.rows(0, 200).next().is_some_and(|line| line.starts_with("NAME ") && line.contains(" PIDS"))
            && [&one, &two].iter().all(|name| {
                shown_of(screen, name).is_some_and(|line| line.contains('%') && line.contains(" / "))
            })
    });
    let processes = |screen: &vt100::Screen| -> Option<u32> {
        shown_of(screen, &one)?.split_whitespace().last()?.parse().ok()
    };
    let mut sleep =
        cubby_tests::within("start", sandboxes[0].shell_stream("sleep 86431 & sleep 86432")).await;
    terminal.watch("new processes", {
        let first = std::cell::OnceCell::new();
        move |screen| processes(screen).is_some_and(|now| now > *first.get_or_init(|| now))
    });
    drop(sleep.as_mut().unwrap().signal(9).await);
    for sandbox in sandboxes {
        cubby_tests::discard(sandbox).await;
    }
    // Those that other tests have may come and go; each has one line, and nothing is below the last.
    terminal.watch("shorter table", |screen| {
        let text = screen.contents();
        let names: Vec<&str> = text.lines().filter_map(|line| line.split_whitespace().next()).collect();
        let each: std::collections::BTreeSet<&&str> = names.iter().collect();
        names.first() == Some(&"NAME")
            && each.len() == names.len()
            && !names.iter().any(|name| [one.as_str(), two.as_str()].contains(name))
    });
    terminal.type_in("\x03");
    until("the end", async || !terminal.runs()).await;
    assert_eq!(flags(&terminal.modes()), before);
}
