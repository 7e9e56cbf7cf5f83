package agent

import (
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"bauta.dev/bauta/internal/advice"
	"bauta.dev/bauta/internal/lab/labtest"
)

func TestCheckPrivilege(t *testing.T) {
	labtest.Root(t)
	runtime.LockOSThread() // and no other test gets this thread
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var caps [2]unix.CapUserData
	if err := unix.Capget(&header, &caps[0]); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		keep uint32
		bpf  bool
		want string // missing
	}{
		{1<<unix.CAP_NET_ADMIN | 1<<unix.CAP_NET_RAW, false, ""},
		{1 << unix.CAP_NET_ADMIN, true, ""},
		{1 << unix.CAP_NET_ADMIN, false, "NET_RAW"},
		{0, true, "NET_ADMIN"},
		{0, false, "NET_ADMIN"},
	} {
		caps[0].Effective = c.keep
		if err := unix.Capset(&header, &caps[0]); err != nil {
			t.Fatal(err)
		}
		err := checkPrivilege(c.bpf)
		if (err != nil) != (c.want != "") || err != nil && (!strings.Contains(err.Error(), "capability "+c.want+" is") || len(advice.Of(err)) != 1) {
			t.Errorf("%+v: %v", c, err)
		}
	}
}
