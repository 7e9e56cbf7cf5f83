package e2e_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
)

// Somebody holds the lock of iptables-legacy for half a minute, six times as long as an agent
// waits for it: once while it starts, and once while its rules are gone.
func TestIPTablesModeLockHeld(t *testing.T) {
	setsModes(t)
	const held = 30 * time.Second
	for _, running := range []bool{false, true} {
		t.Run(map[bool]string{false: "at the start", true: "while rules are gone"}[running], func(t *testing.T) {
			t.Parallel()
			n := newNode(t, lab.Options{})
			n.useBackend("legacy")
			if running {
				n.start(iptablesMode, podCIDRs)
			}
			lock := n.holdTables()
			taken := time.Now()
			if running {
				n.flushUnlocked()
			} else {
				n.launch(iptablesMode, podCIDRs)
			}
			labtest.Eventually(t, held, func() error {
				if st, err := n.readStatus(); err != nil || !strings.Contains(st.Agent.Error, "e2e.test, pid ") {
					return fmt.Errorf("status: %q, %v", st.Agent.Error, err)
				}
				return nil
			})
			t.Logf("told after %v: %s", time.Since(taken).Round(100*time.Millisecond), n.status().Agent.Error)
			time.Sleep(time.Until(taken.Add(held))) // this long is the fault: there is nothing to wait for
			if n.agent.ended() {
				t.Fatalf("agent ended: %v", n.agent.err)
			}
			if rule := firstOwnRule(n.tables("iptables-legacy-save", "-t", "nat")); rule != "none" {
				t.Errorf("written in spite of the lock: %s", rule)
			}
			lock.Close()
			released := time.Now()
			n.waitReady()
			n.awaitOK()
			t.Logf("in force %v after the lock was free", time.Since(released).Round(100*time.Millisecond))
			n.masqueraded(n.tapWorld())
		})
	}
}

// flushUnlocked takes the rules away as a program does that knows no lock.
func (n *node) flushUnlocked() {
	n.t.Helper()
	out, err := n.Node.Run(within(n.t, patience), "env", "XTABLES_LOCKFILE="+filepath.Join(n.dir, "other.lock"),
		labtest.Tool(n.t, "iptables-legacy"), "-t", "nat", "-F")
	if err != nil {
		n.t.Fatalf("iptables-legacy -F: %v\n%s", err, out)
	}
}

// holdTables takes the lock of the node's iptables-legacy, as a slow program does.
func (n *node) holdTables() *os.File {
	n.t.Helper()
	lock, err := os.Create(strings.TrimPrefix(n.lockFile(), "XTABLES_LOCKFILE="))
	must(n.t, err)
	n.t.Cleanup(func() { lock.Close() })
	must(n.t, unix.Flock(int(lock.Fd()), unix.LOCK_EX))
	return lock
}
