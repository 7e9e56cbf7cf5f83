package cli

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"bauta.dev/bauta/internal/advice"
	"bauta.dev/bauta/internal/agent"
	"bauta.dev/bauta/internal/datapath"
)

// endTimeout is how long cleanup --force waits for the agent to end.
const endTimeout = 15 * time.Second

func (a *app) newCleanup() *cobra.Command {
	var force, stay bool
	c := &cobra.Command{
		Use:   "cleanup",
		Short: "Remove everything Bauta put on this node",
		Long: `Remove everything Bauta put on this node, in either mode: programs and tables;
rules, chains and sets of both backends of iptables; and the files of the run
directory. Masquerading ends, and running masqueraded connections break.

It refuses while an agent runs there. Doing it twice is harmless.`,
		Example: `  sudo systemctl stop bauta && sudo bauta cleanup
  sudo bauta cleanup --force

  # in the pods of a DaemonSet, which must not end: docs/kubernetes.md
  bauta cleanup --stay`,
		Args: noArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if err := a.requireRoot(c, "try sudo "+c.CommandPath()); err != nil {
				return err
			}
			if err := checkBPFRoot(a.bpfRoot); err != nil {
				return err
			}
			if err := a.withoutAgent(c.Context(), force); err != nil {
				return err
			}
			if err := a.cleanup(c.Context()); err != nil || !stay {
				return err
			}
			ctx, stop := signal.NotifyContext(c.Context(), syscall.SIGTERM, syscall.SIGINT)
			defer stop()
			<-ctx.Done()
			return nil
		},
	}
	c.Flags().BoolVar(&force, "force", false, "end an agent that runs there first")
	c.Flags().BoolVar(&stay, "stay", false, "when all is removed, wait for SIGTERM: for the pods of a DaemonSet")
	return c
}

// checkBPFRoot keeps a slip in --bpf-root from emptying another directory: all
// that is in root is going to be removed.
func checkBPFRoot(root string) error {
	var fsInfo unix.Statfs_t
	var dir, parent unix.Stat_t
	if err := unix.Statfs(root, &fsInfo); errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return fmt.Errorf("bpf-root %s: %w", root, err)
	}
	if err := errors.Join(unix.Stat(root, &dir), unix.Stat(filepath.Join(root, ".."), &parent)); err != nil {
		return fmt.Errorf("bpf-root %s: %w", root, err)
	}
	switch {
	case fsInfo.Type != unix.BPF_FS_MAGIC:
		return advice.New(fmt.Errorf("bpf-root %s: not on a bpffs, so it can't hold a data plane", root), "give the --bpf-root of the agent")
	case dir.Dev != parent.Dev:
		return advice.New(fmt.Errorf("bpf-root %s: a whole bpffs, which others use too", root), "give the --bpf-root of the agent, a directory in it")
	}
	return nil
}

// withoutAgent returns nil when no agent serves the run directory. force ends one.
func (a *app) withoutAgent(ctx context.Context, force bool) error {
	pid, running := agentPID(filepath.Join(a.runDir, "agent.sock"))
	if !running {
		return nil
	}
	if err := inTheWay(pid, a.runDir, force); err != nil {
		return err
	}
	if err := a.printf("Ending the agent (pid %d)\n", pid); err != nil {
		return err
	}
	if err := endProcess(ctx, pid); err != nil {
		return fmt.Errorf("end agent, pid %d: %w", pid, err)
	}
	return nil
}

// inTheWay is why an agent that runs is not ended. To kill process 0 would be to kill the group of
// who does it.
func inTheWay(pid int, runDir string, force bool) error {
	switch {
	case pid == 0:
		return advice.New(fmt.Errorf("cleanup: an agent runs here (run directory %s), in another PID namespace: it can't be ended from here", runDir),
			"stop its container first; in Kubernetes: helm uninstall the release with the agent")
	case !force:
		return advice.New(fmt.Errorf("cleanup: an agent runs here (pid %d, run directory %s)", pid, runDir),
			fmt.Sprintf("stop it first: systemctl stop bauta, or kill %d", pid), "bauta cleanup --force ends it")
	}
	return nil
}

// agentPID asks the kernel who listens on the socket; 0 is a process that this
// PID namespace can't see.
func agentPID(socket string) (pid int, running bool) {
	conn, err := net.Dial("unix", socket)
	if err != nil {
		return 0, false // no file, or nobody listens behind it
	}
	defer conn.Close()
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return 0, true
	}
	raw.Control(func(fd uintptr) {
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			pid = int(cred.Pid)
		}
	})
	return pid, true
}

// endProcess sends SIGTERM and waits for the end.
func endProcess(ctx context.Context, pid int) error {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if errors.Is(err, unix.ESRCH) {
		return nil
	} else if err != nil {
		return err
	}
	ended := os.NewFile(uintptr(fd), "pidfd")
	defer ended.Close()
	if err := unix.PidfdSendSignal(fd, unix.SIGTERM, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return err
	}
	deadline := time.Now().Add(endTimeout)
	for {
		left := time.Until(deadline)
		if left <= 0 {
			return fmt.Errorf("still there after %v", endTimeout)
		}
		// Short waits, so that the caller's own end is noticed.
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(min(left, 200*time.Millisecond)/time.Millisecond)+1)
		switch {
		case err != nil && !errors.Is(err, unix.EINTR):
			return err
		case n > 0:
			return nil
		case ctx.Err() != nil:
			return ctx.Err()
		}
	}
}

// cleanup removes what there is of both modes. What stops one does not stop the others,
// but the run directory tells which mode there was: it goes last.
func (a *app) cleanup(ctx context.Context) error {
	programs, programsErr := a.removePrograms()
	rules, rulesErr := a.removeRules(ctx)
	removed, err := append(programs, rules...), errors.Join(programsErr, rulesErr)
	if err == nil {
		var files []string
		files, err = removeRunFiles(a.runDir)
		removed = append(removed, files...)
	}
	if err == nil && len(removed) == 0 {
		return a.print("Nothing to remove\n")
	}
	for _, what := range removed {
		if err := a.printf("Removed %s\n", what); err != nil {
			return err
		}
	}
	return err
}

// removePrograms removes what eBPF mode has in the kernel.
func (a *app) removePrograms() ([]string, error) {
	removed, err := datapath.Remove(a.bpfRoot)
	if errors.Is(err, datapath.ErrBusy) {
		return nil, a.held(a.bpfRoot)
	}
	for i, what := range removed {
		if !strings.ContainsAny(what, "/ ") { // the name of a pin
			removed[i] = filepath.Join(a.bpfRoot, what)
		}
	}
	return removed, err
}

// removeRules removes what iptables mode has in the kernel. Without its programs, which
// eBPF mode does not need, nobody can look for it.
func (a *app) removeRules(ctx context.Context) ([]string, error) {
	removed, notes, err := agent.RemoveRules(ctx)
	if errors.Is(err, agent.ErrBusy) {
		return nil, a.held("the rules of this network namespace")
	}
	for _, n := range notes {
		fmt.Fprintf(a.Stderr, "note: %s\n", oneLine(n))
	}
	return removed, err
}

// held is the error about an agent elsewhere. It wraps nothing: the hints of what it stands
// for are for a second agent.
func (a *app) held(what string) error {
	return advice.New(fmt.Errorf("cleanup: an agent holds %s", what),
		"it has another run directory than "+a.runDir+": give that with --run-dir, or stop the agent")
}

// removeRunFiles removes what the agent left in its run directory, and the
// directory if it is empty then. Other files there are not ours.
func removeRunFiles(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, fmt.Errorf("run directory: %w", err)
	}
	var removed []string
	for _, e := range entries {
		// The agent writes policy.json by way of .policy.json.NUMBER.
		if e.Name() != "agent.sock" && !strings.HasPrefix(strings.TrimPrefix(e.Name(), "."), "policy.json") {
			continue
		}
		path := filepath.Join(dir, e.Name())
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return removed, fmt.Errorf("run directory: %w", err)
		}
		removed = append(removed, path)
	}
	if err := os.Remove(dir); err == nil {
		removed = append(removed, dir)
	}
	return removed, nil
}
