package iptables

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"bauta.dev/bauta/internal/advice"
)

// program is the pair of binaries for a backend and a family, by absolute paths.
type program struct {
	family        Family
	backend       Backend
	save, restore string
	opts          Options
}

// searchPath is where binaries are, also for an agent that runs with a short PATH.
func (o Options) searchPath() []string {
	if o.dirs != nil {
		return o.dirs
	}
	return append(filepath.SplitList(os.Getenv("PATH")), "/usr/sbin", "/sbin", "/usr/local/sbin", "/usr/bin")
}

func (o Options) find(name string) string {
	for _, dir := range o.searchPath() {
		path := filepath.Join(dir, name)
		if info, err := os.Stat(path); filepath.IsAbs(path) && err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0 {
			return path
		}
	}
	return ""
}

// programs finds what is installed for a backend. Distributions without both have
// the plain names only, which then belong to the backend plain.
func (o Options) programs(b, plain Backend) map[Family]program {
	found := make(map[Family]program)
	for _, f := range families {
		names := []string{f.binary() + "-" + string(b)}
		if b == plain {
			names = append(names, f.binary())
		}
		for _, name := range names {
			p := program{f, b, o.find(name + "-save"), o.find(name + "-restore"), o}
			if p.save != "" && p.restore != "" {
				found[f] = p
				break
			}
		}
	}
	return found
}

// installed are the programs of both backends and families.
func (o Options) installed(ctx context.Context) (list []program) {
	plain := o.plainBackend(ctx)
	for _, b := range []Backend{NFT, Legacy} {
		progs := o.programs(b, plain)
		for _, f := range families {
			if p, ok := progs[f]; ok {
				list = append(list, p)
			}
		}
	}
	return list
}

// plainBackend is what the plain `iptables` belongs to; versions before 1.8 don't say,
// and know only one.
func (o Options) plainBackend(ctx context.Context) Backend {
	path := o.find("iptables")
	if path == "" {
		return ""
	}
	out, err := o.run(ctx, path, "", "--version")
	switch {
	case err != nil:
		return ""
	case strings.Contains(out, "nf_tables"):
		return NFT
	}
	return Legacy
}

// runTime is more than a binary needs with very many rules; it comes on top of the time for the
// lock.
const runTime = 30 * time.Second

// readTime is what somebody who looks at a node waits for all binaries together.
const readTime = 20 * time.Second

var errHangs = errors.New("no answer")

// reading limits all calls of binaries with the context together.
func (o Options) reading(ctx context.Context) (context.Context, context.CancelFunc) {
	limit := cmp.Or(o.readTime, readTime)
	return context.WithTimeoutCause(ctx, limit, fmt.Errorf("%w for %s", errHangs, limit))
}

// hangs is the error of a reader whose context has ended.
func hangs(ctx context.Context, what string) error {
	cause := context.Cause(ctx)
	switch {
	case errors.Is(cause, context.Canceled):
		return fmt.Errorf("%s: %w", what, cause)
	case !errors.Is(cause, errHangs): // a limit of the caller's
		cause = fmt.Errorf("%w in time: %w", errHangs, cause)
	}
	return advice.New(fmt.Errorf("%s: %w", what, cause), "a program of iptables hangs, or its machine is overloaded: `ps -ef | grep tables` shows it",
		"the rules in the kernel stay in force meanwhile")
}

// run runs a binary in the network namespace of the calling thread. One that hangs must not
// hang the agent, which has one loop for everything.
func (o Options) run(ctx context.Context, path, stdin string, args ...string) (string, error) {
	limit := cmp.Or(o.runTime, runTime) + time.Duration(o.lockSeconds())*time.Second
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("%w for %s", errHangs, limit))
	defer cancel()
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Env = append(os.Environ(), o.env...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &stdout, &stderr
	cmd.WaitDelay = time.Second
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return stdout.String(), o.explain(filepath.Base(path), err, stderr.String(), stdin)
	}
	return stdout.String(), nil
}

// read returns the state of a table, which the kernel may make for that.
func (p program) read(ctx context.Context, table string) (tableState, error) {
	out, err := p.opts.run(ctx, p.save, "", "-t", table)
	if err != nil {
		return tableState{}, err
	}
	states, err := p.states(ctx, out)
	return states[table], err
}

// readAll returns the state of all tables that exist, and makes none.
func (p program) readAll(ctx context.Context) (map[string]tableState, error) {
	out, err := p.opts.run(ctx, p.save, "")
	if err != nil {
		return nil, err
	}
	return p.states(ctx, out)
}

// write runs a script of iptables-restore.
func (p program) write(ctx context.Context, script string) error {
	const races = 3 // another program's change in between: legacy tables are replaced whole
	for try := 1; ; try++ {
		_, err := p.opts.run(ctx, p.restore, script, "--noflush", "-w", strconv.Itoa(p.opts.lockSeconds()))
		if err == nil || try == races || !strings.Contains(err.Error(), "Resource temporarily unavailable") {
			return err
		}
	}
}

func (o Options) lockSeconds() int {
	d := o.LockTimeout
	if d <= 0 {
		d = defaultLockTimeout
	}
	return max(1, int((d+time.Second-1)/time.Second))
}

var (
	restoreLine = regexp.MustCompile(`(?i)(?:error occurred at line:|line) (\d+)`)
	versionHead = regexp.MustCompile(`^ip6?tables(-nft|-legacy)?(-restore|-save)?( v[0-9.]+ \([a-z_]+\))?: `)
)

// explain makes one line of what a binary wrote, with the rule that it is about.
func (o Options) explain(name string, err error, stderr, script string) error {
	var lines []string
	for line := range strings.Lines(stderr) {
		line = versionHead.ReplaceAllString(strings.TrimSpace(line), "")
		if line != "" && !strings.HasPrefix(line, "Try `") && !strings.HasPrefix(line, "# Warning") {
			lines = append(lines, line)
		}
	}
	if strings.Contains(stderr, "xtables lock") {
		return o.lockError(name)
	}
	if len(lines) == 0 {
		return fmt.Errorf("%s: %w", name, err)
	}
	what := strings.TrimSuffix(lines[0], ".")
	for _, line := range lines {
		if m := restoreLine.FindStringSubmatch(line); m != nil {
			n, _ := strconv.Atoi(m[1])
			if rules := strings.Split(script, "\n"); n > 0 && n <= len(rules) {
				what += fmt.Sprintf(" (at %q)", rules[n-1])
				break
			}
		}
	}
	out := fmt.Errorf("%s: %s: %w", name, what, err)
	switch {
	case strings.Contains(stderr, "Permission denied"), strings.Contains(stderr, "you must be root"):
		return advice.New(out, "run it as root, with CAP_NET_ADMIN and CAP_NET_RAW")
	case strings.Contains(stderr, "can't initialize"), strings.Contains(stderr, "Cannot initialize"), strings.Contains(stderr, "Table does not exist"),
		strings.Contains(stderr, "initialize nft:"), strings.Contains(stderr, "ADD failed (No such file or directory)"), strings.Contains(stderr, "ADD failed (Operation not supported)"):
		return advice.New(fmt.Errorf("%w: %w", errNoTable, out), "the kernel lacks this table, or its module is not loaded (iptable_nat, ip6table_nat, nft_chain_nat)")
	}
	return out
}

var (
	// errNoTable says that a table is not to be had in this kernel.
	errNoTable = errors.New("no such table in this kernel")
	// errHidden says that what is in a table can't be found out.
	errHidden = errors.New("it holds rules that iptables can't show")
)
