package e2e_test

import (
	"fmt"
	"os"
	"runtime"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"bauta.dev/bauta/internal/agent"
	"bauta.dev/bauta/internal/datapath"
	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
)

// withoutTCX names the program that this test binary turns into, in a kernel that
// denies having tcx.
const withoutTCX = "BAUTA_E2E_WITHOUT_TCX"

// becomeOldKernelAgent replaces this process by a program for which the query of
// attached programs is an error, as on a kernel older than 6.6. It returns only
// if that goes wrong.
func becomeOldKernelAgent(program string) error {
	const bpfProgQuery = 16
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 0}, // system call number
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_BPF, Jf: 3},
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 16}, // its first argument, lower half
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: bpfProgQuery, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(unix.EINVAL)},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	}
	runtime.LockOSThread()
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("no new privileges: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(&prog)), 0, 0); err != nil {
		return fmt.Errorf("seccomp: %w", err)
	}
	os.Unsetenv(withoutTCX)
	return syscall.Exec(program, append([]string{program}, os.Args[1:]...), os.Environ())
}

// eachHook runs a test with a node of its own on each kind of attachment, with
// the agent running. In iptables mode there is one kind.
func eachHook(t *testing.T, opts lab.Options, test func(*testing.T, *node), args ...string) {
	t.Helper()
	for _, hook := range hooks() {
		t.Run(hookName(hook), func(t *testing.T) {
			t.Parallel()
			if hook == datapath.HookTCX {
				labtest.Kernel(t, labtest.TCX)
			}
			n := newNode(t, opts)
			n.noTCX = hook == datapath.HookTC
			n.start(append([]string{podCIDRs}, args...)...)
			n.expectHook(hook)
			test(t, n)
		})
	}
}

// hooks are the kinds of attachment in the mode of the run.
func hooks() []datapath.Hook {
	if suiteBackend != "" {
		return []datapath.Hook{agent.HookIPTables}
	}
	return []datapath.Hook{datapath.HookTCX, datapath.HookTC}
}

func hookName(hook datapath.Hook) string {
	if hook == agent.HookIPTables {
		return "iptables-" + suiteBackend
	}
	return string(hook)
}

// expectHook checks how eth0 is attached. In iptables mode it is by rules, whatever the test did
// to have another hook.
func (n *node) expectHook(hook datapath.Hook) {
	n.t.Helper()
	if n.backend != "" {
		hook = agent.HookIPTables
	}
	if st := n.status(); len(st.Devices) != 1 || st.Devices[0].Hook != hook {
		n.t.Fatalf("devices: %+v, want one on %s", st.Devices, hook)
	}
}
