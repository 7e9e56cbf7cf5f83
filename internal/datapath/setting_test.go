package datapath

import "testing"

// A step that shares a divisor with the pool's size would never visit some ports.
func TestStridesVisitEveryPort(t *testing.T) {
	for _, n := range []int{1, 2, 3, 4, 6, 30, 1000, 2048, 28976, 32768, 61744, 65535} {
		for _, step := range strides(n) {
			if n > 1 && gcd(step, uint32(n)) != 1 {
				t.Errorf("pool of %d ports: step %d", n, step)
			}
		}
	}
}
