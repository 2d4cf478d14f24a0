package wait

import _ "embed"

//go:embed wait_arm64
var program []byte
