package agent

import (
	"runtime"
	"testing"

	"golang.org/x/sys/unix"

	"bauta.dev/bauta/internal/advice"
)

func TestCheckPrivilege(t *testing.T) {
	runtime.LockOSThread() // and no other test gets this thread
	var none [2]unix.CapUserData
	if err := unix.Capset(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &none[0]); err != nil {
		t.Fatal(err)
	}
	if err := checkPrivilege(); len(advice.Of(err)) != 1 {
		t.Errorf("without capabilities: %v", err)
	}
}
