package cluster

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"bauta.dev/bauta/internal/lab"
)

// starts is served by one thread that lives as long as the process: the signal that
// ends a component with its parent is sent when the thread that started it ends.
var starts = make(chan func())

func init() {
	go func() {
		runtime.LockOSThread()
		for f := range starts {
			f()
		}
	}()
}

// process is a component that runs, with a log of its own.
type process struct {
	name string
	cmd  *exec.Cmd
	done chan struct{}
}

// start runs a component in a network namespace. Its output is appended to
// DIR/NAME.log.
func start(ns *lab.NS, dir, name string, cmd *exec.Cmd) (*process, error) {
	out, err := os.OpenFile(filepath.Join(dir, name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer out.Close() // the process has one of its own
	cmd.Stdout, cmd.Stderr = out, out
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	// A group of its own: an interrupt from the keyboard is for the harness.
	cmd.SysProcAttr.Setpgid = true
	started := make(chan error)
	starts <- func() { started <- ns.Start(cmd) }
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	p := &process{name, cmd, make(chan struct{})}
	go func() {
		cmd.Wait() // how it ended is in its log
		close(p.done)
	}()
	return p, nil
}

// kill ends a process at once: the API server would wait a minute for watches.
func (p *process) kill() error {
	if p == nil {
		return nil
	}
	err := p.cmd.Process.Kill()
	<-p.done
	if errors.Is(err, os.ErrProcessDone) {
		return nil
	}
	return err
}

// ended says whether the process is no more.
func (p *process) ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// tail returns the last lines of a log that have one of the words, or of all lines.
func tail(path string, n int, words ...string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return err.Error() + "\n"
	}
	var lines []string
	for line := range strings.Lines(string(b)) {
		if len(words) == 0 || containsAny(line, words) {
			lines = append(lines, shorten(line))
		}
	}
	return strings.Join(lines[max(0, len(lines)-n):], "")
}

func containsAny(line string, words []string) bool {
	for _, w := range words {
		if strings.Contains(line, w) {
			return true
		}
	}
	return false
}

// shorten leaves out the ends of lines that print whole objects.
func shorten(line string) string {
	const most = 300
	if len(line) <= most {
		return line
	}
	return line[:most] + "...\n"
}
